"""Generates a data set: many slots under way in one engine, whole shards on disk.

What a shard holds follows from the recipe (with an engine that is not batch-invariant: and the engine's batch size),
never from when a run was interrupted: duplicates are sought in order of slots, and the data set ends with the shard
that completes its budget, however many later ones were under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from train.data.chat_format import ChatFormat
from train.data.conversations import Kept, Lost
from train.data.dialogue import Opening, converse, open_slot
from train.data.engines.base import Completion, Engine, Request
from train.data.prompts import Openings
from train.data.recipe import Recipe
from train.data.shards import ShardDirectory

MIN_JUDGED = 256
MIN_KEPT_SHARE = 0.02
"""Once MIN_JUDGED slots are known, at least this share of them must be conversations."""

_Steps = Generator[Request, Completion, Any]


@dataclass
class _Shard:
    """A shard under way. openings, slots: index → what is known of it, complete when as many as `indices`."""

    number: int
    indices: range
    openings: dict[int, Opening | Lost] = field(default_factory=dict)
    slots: dict[int, Kept | Lost] = field(default_factory=dict)


class DataGenerator:
    """One run over a recipe, continuing with the shards that are there. `run` is called once.

    on_tokens: called with the number of tokens of each completion.
    """

    def __init__(
        self,
        chat: ChatFormat,
        recipe: Recipe,
        openings: Openings,
        engine: Engine,
        shards: ShardDirectory,
        on_tokens: Callable[[int], None],
    ) -> None:
        self._chat, self._recipe, self._openings = chat, recipe, openings
        self._engine, self._shards, self._on_tokens = engine, shards, on_tokens
        self._under_way: dict[int, tuple[_Steps, Callable[[int, Any], None]]] = {}  # slot → steps, what comes after
        self._open: dict[int, _Shard] = {}  # begun, not finished
        self._found: dict[int, list[Kept | Lost]] = {}  # finished by an earlier run, not settled
        self._tokens: dict[int, int] = {}  # finished shard → tokens that the target wrote in it
        self._num_settled = 0  # first shards in which duplicates have been sought
        self._seen: set[str] = set()
        self._num_kept = 0
        self._lost: Counter[str] = Counter()

    def run(self) -> None:
        """Generate what is missing. Raises ValueError as the engine does, and when hardly any prompt is usable."""
        self._begin_shards()
        while self._under_way and self._num_needed() is None:
            with closing(self._engine.completions()) as completions:
                for completion in completions:
                    self._on_tokens(len(completion.token_ids))
                    self._advance(completion.number, completion)
                    if self._num_needed() is not None:
                        break
                    self._begin_shards()
        num_needed = self._num_needed()
        self._shards.remove_from(self._num_begun if num_needed is None else num_needed)

    @property
    def _num_begun(self) -> int:
        return len(self._open) + len(self._tokens)

    def _num_needed(self) -> int | None:
        """How many of the first shards reach the budget; None while no unbroken row of finished ones does."""
        total = 0
        for number in range(self._num_begun):
            if number not in self._tokens:
                return None
            total += self._tokens[number]
            if total >= self._recipe.num_tokens:
                return number + 1
        return None

    # ---- beginning shards ------------------------------------------------------------------------------------------

    def _begin_shards(self) -> None:
        """Begin, or read, as many shards as keep the engine busy."""
        while self._wants_more():
            number, size = self._num_begun, self._recipe.shard_size
            found = self._shards.read(number)
            if found is not None:
                self._found[number] = found
                self._tokens[number] = sum(slot.num_written for slot in found)
                self._settle()
                continue
            indices = range(number * size, self._openings.num_slots((number + 1) * size))
            self._open[number] = _Shard(number, indices)
            for index in indices:
                steps = open_slot(self._chat, self._recipe, index, self._openings.record(index))
                self._start(index, steps, self._opened)

    def _wants_more(self) -> bool:
        first = self._num_begun * self._recipe.shard_size
        if self._openings.num_slots(first + 1) <= first:
            return False
        if self._open and not self._engine.is_batch_invariant:
            return False  # what a shard holds may depend on what is generated with it: its own slots alone
        if len(self._under_way) > self._engine.capacity:
            return False
        done = sum(self._tokens.values())
        mean = done / len(self._tokens) if self._tokens else self._recipe.guessed_tokens * self._recipe.shard_size
        return done + mean * len(self._open) < self._recipe.num_tokens

    # ---- slots -----------------------------------------------------------------------------------------------------

    def _start(self, index: int, steps: _Steps, then: Callable[[int, Any], None]) -> None:
        self._under_way[index] = (steps, then)
        self._advance(index, None)

    def _advance(self, index: int, completion: Completion | None) -> None:
        """Let a slot go on with the completion that it waited for; None begins it."""
        steps, then = self._under_way[index]
        try:
            self._engine.submit(next(steps) if completion is None else steps.send(completion))
        except StopIteration as end:
            del self._under_way[index]
            then(index, end.value)

    def _opened(self, index: int, opening: Opening | Lost) -> None:
        shard = self._open[index // self._recipe.shard_size]
        shard.openings[index] = opening
        if len(shard.openings) == len(shard.indices):
            self._settle()

    def _finished(self, index: int, slot: Kept | Lost) -> None:
        shard = self._open[index // self._recipe.shard_size]
        shard.slots[index] = slot
        if len(shard.slots) == len(shard.indices):
            slots = [shard.slots[each] for each in shard.indices]
            self._shards.write(shard.number, slots)
            del self._open[shard.number]
            self._tokens[shard.number] = sum(each.num_written for each in slots)

    # ---- duplicates, in order of slots -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Go on to the conversations of every shard whose openings, and those of all before it, are known."""
        while True:
            shard = self._open.get(self._num_settled)
            if self._num_settled in self._found:
                for slot in self._found.pop(self._num_settled):
                    self._count(slot.prompt if isinstance(slot, Kept) else slot)
            elif shard is not None and len(shard.openings) == len(shard.indices):
                for index in shard.indices:
                    self._converse(shard, index)
            else:
                return
            self._num_settled += 1
            self._check_yield()

    def _converse(self, shard: _Shard, index: int) -> None:
        """Begin the slot's conversation, unless its prompt is there already."""
        opening = shard.openings[index]
        if isinstance(opening, Opening) and opening.prompt in self._seen:
            opening = Lost(index, "duplicate", opening.num_written)
        if isinstance(opening, Lost):
            self._finished(index, opening)
            self._count(opening)
            return
        steps = converse(self._chat, self._recipe, index, self._num_kept, opening)
        self._start(index, steps, self._finished)
        slot = shard.slots.get(index)  # known at once where the prompt does not fit
        self._count(slot if isinstance(slot, Lost) else opening.prompt)

    def _count(self, slot: str | Lost) -> None:
        """A kept conversation, by its prompt, or a lost slot."""
        if isinstance(slot, Lost):
            self._lost[slot.reason] += 1
        else:
            self._seen.add(slot)
            self._num_kept += 1

    def _check_yield(self) -> None:
        num_known = self._num_kept + self._lost.total()
        if num_known >= MIN_JUDGED and self._num_kept < MIN_KEPT_SHARE * num_known:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._lost.most_common())
            raise ValueError(
                f"generate: only {self._num_kept} of {num_known} prompts became conversations ({reasons}); raise"
                " generate.self_written.max_tokens, or give prompts (generate=prompts generate.prompts.path=FILE)"
            )
