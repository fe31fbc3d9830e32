"""Drafts of a known quality: what speculation would give if acceptance were so and so.

A drafter that has been told the answer drafts chains that are right exactly as often as asked. What it costs to draft
is real where it is given a drafter whose drafts it makes and throws away. Its figures are of no real mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from deploy.runtime.drafters.base import Drafter, Float32
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import MOST_NODES, Draft


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Raises ValueError for none, too many, and one that is no share."""
    if not 1 <= len(rates) <= MOST_NODES:
        raise ValueError(f"synthetic acceptance has {len(rates)} rates; give 1 … {MOST_NODES}")
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"synthetic acceptance {rate:g} is out of range; use shares from 0 to 1")
    return tuple(rates)


def parse_rates(text: str) -> tuple[float, ...]:
    """From "0.8,0.6". Raises ValueError for what is no number, and as `check_rates`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"synthetic acceptance {text!r} is not a list of shares such as 0.8,0.6,0.5") from error
    return check_rates(found)


def rates_survival(rates: Sequence[float]) -> tuple[float, ...]:
    """Share of rounds accepted up to each place, from the shares of each place given those before."""
    return tuple(itertools.accumulate(rates, lambda before, rate: before * rate))


class SyntheticDrafter:
    """Drafter (deploy/runtime/drafters/base.py) whose token at place j is right in a share `rates[j]` of the rounds
    in which all before it are.

    Shares are kept by carrying remainders, not by drawing: after n such rounds n · rate of them are right, to within
    one. seed: which of them. inner: drafts for the time that it takes; its drafts are not used.
    """

    def __init__(self, rates: Sequence[float], vocab_size: int, *, inner: Drafter | None = None, seed: int = 0) -> None:
        self._rates, self._vocab_size = check_rates(rates), vocab_size
        self._inner: Drafter = NoDrafter() if inner is None else inner
        self._carried = list(np.random.default_rng(seed).random(len(self._rates)))
        self._texts: list[list[int]] = []
        self._text: list[int] | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        return self._inner.taps

    def tell(self, texts: Sequence[Sequence[int]]) -> None:
        """The whole texts of the next answers: each prompt with what the target alone continues it with."""
        self._texts = [list(text) for text in texts]

    def begin(self, sequence: int, length: int) -> int:
        self._text = None
        return self._inner.begin(sequence, length)

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        self._inner.commit(sequence, tokens, features)

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        self._inner.propose(sequence, path, budget, sampling, sample_index)
        if self._text is None:
            self._text = next(text for text in self._texts if text[: len(path)] == list(path))
        tokens: list[int] = []
        is_right = True
        for place in range(min(len(self._rates), budget)):
            position = len(path) + place
            truth = self._text[position] if position < len(self._text) else 0
            is_right = is_right and self._is_next_right(place)
            tokens.append(truth if is_right else (truth + 1) % self._vocab_size)
        return Draft.chain(tokens)

    def _is_next_right(self, place: int) -> bool:
        self._carried[place] += self._rates[place]
        is_right = self._carried[place] >= 1
        self._carried[place] -= is_right
        return bool(is_right)

    def reset(self, sequence: int) -> None:
        self._inner.reset(sequence)
