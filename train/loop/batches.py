"""Which conversations make which batch: packing that depends on (seed, epoch) alone.

Conversations are packed whole, one after the other, and nothing is padded. First-fit over a few open batches, in a
fresh random order every epoch. The batches of successive epochs form one endless stream, which optimizer steps take in
groups: no batch is lost at an epoch's end, and a position in the stream, (epoch, cursor), is all that resuming needs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

OPEN_BATCHES = 16
"""First-fit looks at this many unfinished batches; with more, batches are hardly fuller."""


class TokenSequence(Protocol):
    """What is packed: a conversation, or any text whose tokens are partly or wholly learned from."""

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """[n]"""
        ...

    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """[n], True at tokens that are learned from."""
        ...


@dataclass(frozen=True)
class Batch:
    """One or more whole conversations packed one after the other; nothing is padded.

    token_ids: int64 [T]. loss_mask: bool [T]. position: int64 [T], restarts with each conversation.
    starts: int64 [S + 1], offsets of the S conversations, and T. features: float32 [T, L, H], hidden states of the
    target at L layers (to bfloat16's precision), or None where the task needs none.
    """

    token_ids: Tensor
    loss_mask: Tensor
    position: Tensor
    starts: Tensor
    features: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        features = None if self.features is None else self.features.to(device)
        token_ids, loss_mask = self.token_ids.to(device), self.loss_mask.to(device)
        return Batch(token_ids, loss_mask, self.position.to(device), self.starts.to(device), features)


@dataclass(frozen=True)
class Position:
    """A place in the stream of batches: `cursor` batches of this epoch are behind it."""

    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step's batches, each the indices of its conversations, and the place in the stream after it."""

    batches: tuple[tuple[int, ...], ...]
    num_tokens: int
    end: Position


class BatchPlan:
    """Packs sequences into batches of at most `tokens_per_batch` tokens.

    Sequences are cut to their first `max_length` tokens; those with nothing to learn from then are left out.
    Raises ValueError when none remains.
    """

    def __init__(
        self, sequences: Sequence[TokenSequence], *, tokens_per_batch: int, max_length: int, seed: int
    ) -> None:
        cut = [(sequence.token_ids[:max_length], sequence.loss_mask()[:max_length]) for sequence in sequences]
        self._sequences = [(token_ids, mask) for token_ids, mask in cut if mask.any()]
        if not sequences:
            raise ValueError("there is no text to train on; give more, or longer texts")
        if not self._sequences:
            raise ValueError(
                f"none of the {len(sequences)} training conversations has a token to learn from within "
                f"max_length={max_length}; generate more, or raise max_length"
            )
        self._lengths = [len(token_ids) for token_ids, _ in self._sequences]
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)

    @property
    def num_sequences(self) -> int:
        """Sequences that are not left out."""
        return len(self._sequences)

    @property
    def num_learned(self) -> int:
        """Their tokens that are learned from."""
        return sum(int(mask.sum()) for _, mask in self._sequences)

    def digest(self) -> str:
        """Names the sequences: equal for equal tokens and masks in the same order."""
        digest = hashlib.sha256()
        for token_ids, mask in self._sequences:
            digest.update(len(token_ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(token_ids, np.int32).tobytes())
            digest.update(np.packbits(mask).tobytes())
        return digest.hexdigest()

    def epochs(self, position: Position) -> float:
        """Epochs behind `position`, counted in batches."""
        return position.epoch + position.cursor / len(self._epoch(position.epoch))

    def steps(self, start: Position, batches_per_step: int) -> Iterator[StepPlan]:
        """The endless stream of steps from `start` on."""
        position = start
        while True:
            chosen = []
            for _ in range(batches_per_step):
                batches = self._epoch(position.epoch)
                chosen.append(batches[position.cursor])
                at_end = position.cursor + 1 == len(batches)
                position = Position(position.epoch + at_end, 0 if at_end else position.cursor + 1)
            num_tokens = sum(self._lengths[index] for batch in chosen for index in batch)
            yield StepPlan(tuple(chosen), num_tokens, position)

    def token_ids(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids [n] of a sequence, as packed (cut)."""
        return self._sequences[index][0]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch that holds these sequences in this order, without features."""
        lengths = [self._lengths[index] for index in indices]
        token_ids = np.concatenate([self._sequences[index][0] for index in indices]).astype(np.int64)
        return Batch(
            token_ids=torch.from_numpy(token_ids),
            loss_mask=torch.from_numpy(np.concatenate([self._sequences[index][1] for index in indices])),
            position=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
            starts=torch.from_numpy(np.cumsum([0, *lengths])),
        )

    def _pack_epoch(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
        return pack(self._lengths, order.tolist(), self._tokens_per_batch)


def pack(lengths: Sequence[int], order: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """First-fit in the given order: every batch holds at most `capacity` tokens, or one longer sequence.

    When a sequence fits into none of the `OPEN_BATCHES` open batches, the oldest of them is closed.
    """
    closed: list[list[int]] = []
    opened: list[list[int]] = []  # the oldest first
    room: list[int] = []  # tokens that still fit into each open batch
    for index in order:
        slot = next((slot for slot, left in enumerate(room) if lengths[index] <= left), None)
        if slot is None:
            if len(opened) == OPEN_BATCHES:
                closed.append(opened.pop(0))
                room.pop(0)
            slot = len(opened)
            opened.append([])
            room.append(capacity)
        opened[slot].append(index)
        room[slot] -= lengths[index]
    return tuple(tuple(batch) for batch in closed + opened)
