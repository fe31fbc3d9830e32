"""Drafts from the text itself: what followed the last time that its end occurred.

Training-free (prompt lookup decoding; LLMA, arXiv 2304.04487): good where answers repeat their prompt or themselves.
The longer the end that occurred before, the surer is what follows it, so each length of a match has its own number of
tokens. A copy may run into itself, as in LZ77: where a text goes round in three words, twelve are drafted of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.runtime.drafters.base import Float32
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import MOST_NODES, Draft

NUM_TOKENS: Mapping[int, int] = {2: 4, 3: 5, 4: 6, 8: 8, 16: 12}
"""Length of a match → tokens that are drafted, where nothing is known of the machine."""


@dataclass(frozen=True)
class Match:
    """The text's last `length` tokens occurred before, and `position` is where what followed them begins."""

    position: int
    length: int


_TAKEN_BACK = 64
"""Tokens of an index that can be taken back one by one: drafts that were refused."""


@dataclass
class _Index:
    """Where each n-gram of the text's first `length` tokens was last followed by something.

    followers: by the n-gram's hash, which takes less memory; were two of them equal, a draft would be wrong, no more.
    replaced: of the last tokens, what each put into `followers` and what stood there before, to take it back.
    """

    followers: dict[int, int] = field(default_factory=dict)
    length: int = 0
    replaced: deque[list[tuple[int, int | None]]] = field(default_factory=lambda: deque(maxlen=_TAKEN_BACK))

    def add(self, path: Sequence[int], end: int, lengths: Iterable[int]) -> None:
        """path[end] follows what ends there."""
        before = []
        for length in lengths:
            if end >= length:
                key = hash(tuple(path[end - length : end]))
                before.append((key, self.followers.get(key)))
                self.followers[key] = end
        self.replaced.append(before)

    def take_back(self) -> None:
        """Undo the last `add`."""
        for key, position in reversed(self.replaced.pop()):
            if position is None:
                del self.followers[key]
            else:
                self.followers[key] = position
        self.length -= 1


class LookupDrafter:
    """Drafter (deploy/runtime/drafters/base.py) that needs no model.

    num_tokens: how many of the text's last tokens must have occurred before → tokens that are then drafted, at most.
    Longer matches are tried first. Raises ValueError for a number out of range.
    """

    taps = ()

    def __init__(self, num_tokens: Mapping[int, int] = NUM_TOKENS) -> None:
        if not num_tokens or min(num_tokens) < 1 or not all(1 <= n <= MOST_NODES for n in num_tokens.values()):
            raise ValueError(f"num_tokens={dict(num_tokens)} must give lengths of 1 or more 1 … {MOST_NODES} tokens")
        self._num_tokens = {length: num_tokens[length] for length in sorted(num_tokens, reverse=True)}
        self._indices: dict[int, _Index] = {}

    def begin(self, sequence: int, length: int) -> int:
        index = self._indices.pop(sequence, None)  # an interrupt leaves none; it is built again in the next draft
        if index is None or index.length - length > len(index.replaced):
            return length
        while index.length > length:
            index.take_back()
        self._indices[sequence] = index
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """Nothing: `propose` reads the text."""

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        match = self.find(sequence, path)
        if match is None:
            return Draft()
        return Draft.chain(copy_onwards(path, match.position, min(budget, self._num_tokens[match.length])))

    def find(self, sequence: int, path: Sequence[int]) -> Match | None:
        """The longest end of `path` that occurred before, at its last occurrence."""
        index = self._indices.pop(sequence, None) or _Index()  # as in `begin`: an interrupt leaves none
        for end in range(max(index.length, 1), len(path)):
            index.add(path, end, self._num_tokens)
        index.length = len(path)
        self._indices[sequence] = index
        for length in self._num_tokens:
            position = index.followers.get(hash(tuple(path[-length:]))) if len(path) >= length else None
            if position is not None:
                return Match(position, length)
        return None

    def reset(self, sequence: int) -> None:
        self._indices.pop(sequence, None)


def copy_onwards(path: Sequence[int], position: int, count: int) -> list[int]:
    """`count` tokens from `position` on, as if what is copied were behind the text already. position: within it."""
    copied = list(path[position : position + count])
    period = len(path) - position
    while len(copied) < count:
        copied.append(copied[-period])
    return copied
