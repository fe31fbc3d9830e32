"""What to generate: budgets, sampling, and which split and temperature a conversation gets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class SelfWritten:
    """User turns that the target writes: at most `max_tokens` each, by nucleus sampling.

    first_words: of a conversation's first turn, one of them drawn for each slot; none are given where there are none.
    """

    max_tokens: int
    temperature: float
    top_p: float
    first_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A data set to generate.

    num_tokens: that the target writes in all (prompts included), up to the end of the shard that reaches it.
    num_heldout: conversations held out, the first ones, so that a larger data set holds out the same.
    heldout_greedy_share: of them, spread evenly; the others and all training conversations draw from `temperatures`.
    max_tokens: of one response. stop_loops: whether one that goes round in circles ends there (train/data/loops.py).
    num_turns: user turns of a conversation, where it can be continued.
    context_length: of the model; a conversation that would exceed it is not begun, or not continued.
    shard_size: slots of a shard.
    """

    num_tokens: int
    num_heldout: int
    heldout_greedy_share: float
    temperatures: tuple[float, ...]
    top_p: float
    max_tokens: int
    stop_loops: bool
    num_turns: int
    self_written: SelfWritten
    context_length: int
    shard_size: int
    seed: int

    @property
    def guessed_tokens(self) -> int:
        """Tokens that a slot will take, before any is known: half of what it may."""
        return (self.self_written.max_tokens + self.max_tokens * self.num_turns) // 2

    def split(self, rank: int) -> str:
        """Of the conversation that is number `rank` among those that are kept."""
        return "heldout" if rank < self.num_heldout else "train"

    def temperature(self, rank: int, index: int) -> float:
        """Of the responses of conversation `rank` in slot `index`."""
        if rank < self.num_heldout and int((rank + 1) * self.heldout_greedy_share) > int(
            rank * self.heldout_greedy_share
        ):
            return 0.0
        return self.temperatures[self._draw("temperature", index, len(self.temperatures))]

    def first_words(self, index: int) -> str:
        """That the self-written prompt of slot `index` begins with, "" where the target chooses them too."""
        choices = self.self_written.first_words
        return choices[self._draw("first words", index, len(choices))] if choices else ""

    def _draw(self, what: str, index: int, num_choices: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{what}/{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % num_choices
