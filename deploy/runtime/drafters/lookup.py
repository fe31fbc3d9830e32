"""Drafts from the text itself: what followed the last time that its end occurred.

Training-free (prompt lookup decoding; LLMA, arXiv 2304.04487): good where answers repeat their prompt or themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.runtime.drafters.base import Float32
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft


@dataclass(frozen=True)
class Match:
    """The text's last `length` tokens occurred before, and `position` is where what followed them begins."""

    position: int
    length: int


@dataclass
class _Index:
    """Where each n-gram of the text's first `num_tokens` tokens was last followed by something."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_tokens: int = 0


class LookupDrafter:
    """Drafter (deploy/runtime/drafters/base.py) that needs no model.

    longest, shortest: how many of the text's last tokens must have occurred before; longer matches are tried first.
    num_tokens: drafted at most. Raises ValueError for lengths that are out of order.
    """

    taps = ()

    def __init__(self, *, longest: int = 4, shortest: int = 2, num_tokens: int = 8) -> None:
        if not 1 <= shortest <= longest or num_tokens < 1:
            raise ValueError(
                f"shortest={shortest}, longest={longest}, num_tokens={num_tokens} must be 1 or more, in this order"
            )
        self._lengths = range(longest, shortest - 1, -1)
        self._num_tokens = num_tokens
        self._indices: dict[int, _Index] = {}

    def begin(self, sequence: int, length: int) -> int:
        index = self._indices.get(sequence)
        if index is not None and index.num_tokens > length:
            del self._indices[sequence]  # built again in the next draft
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """Nothing: `propose` reads the text."""

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        match = self.find(sequence, path)
        if match is None:
            return Draft()
        return Draft.chain(path[match.position : match.position + min(budget, self._num_tokens)])

    def find(self, sequence: int, path: Sequence[int]) -> Match | None:
        """The longest end of `path` that occurred before, at its last occurrence."""
        index = self._indices.setdefault(sequence, _Index())
        for end in range(max(index.num_tokens, 1), len(path)):
            for length in self._lengths:
                if end >= length:
                    index.followers[tuple(path[end - length : end])] = end
        index.num_tokens = len(path)
        for length in self._lengths:
            position = index.followers.get(tuple(path[-length:])) if len(path) >= length else None
            if position is not None:
                return Match(position, length)
        return None

    def reset(self, sequence: int) -> None:
        self._indices.pop(sequence, None)
