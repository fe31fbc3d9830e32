"""A head's drafts that end where one more token would not pay, by the head's own confidence put right.

A drafted token costs a row of the model above, and is worth the probability that it is accepted. A head tells its
probability of every path, but not that of acceptance: where the target is greedy, a token that the head thinks likely
at 0.3 is right far more often, and where it samples, the noise that both share makes the head look surer than it is.
So what was promised and what was accepted are counted, for each temperature, recent rounds weighing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.runtime.drafters.base import Float32
from deploy.runtime.drafters.model import EagleDrafter
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits

_MEMORY = 0.98
"""What a round weighs after one more."""
_PRIOR = 4.0
"""Tokens promised, and kept, before anything was counted."""
_LARGEST_FACTOR = 4.0


@dataclass
class _Promises:
    """promised: sum of the drafted paths' probabilities. kept: tokens of them that were accepted."""

    promised: float = 0.0
    kept: float = 0.0

    @property
    def factor(self) -> float:
        """Acceptance over the head's own probability."""
        factor = (self.kept + _PRIOR) / (self.promised + _PRIOR)
        return min(max(factor, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)

    def count(self, promised: float, kept: int) -> None:
        self.promised = _MEMORY * self.promised + promised
        self.kept = _MEMORY * self.kept + kept


class ConfidentDrafter:
    """Drafter (deploy/runtime/drafters/base.py) over an EAGLE head.

    limits: of a draft at most. worth: the least probability of acceptance with which a token pays for its row.
    """

    def __init__(self, head: EagleDrafter, limits: TreeLimits, worth: float) -> None:
        self._head, self.limits, self.worth = head, limits, worth
        self._promises: dict[float, _Promises] = {}  # temperature → what came of it
        self._open: dict[int, tuple[_Promises, float]] = {}  # sequence → its round: whose, and what it promised

    @property
    def taps(self) -> tuple[int, ...]:
        return self._head.taps

    def begin(self, sequence: int, length: int) -> int:
        self._open.pop(sequence, None)
        return self._head.begin(sequence, length)

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """`tokens` are the one that was certain, and the accepted ones."""
        self._head.commit(sequence, tokens, features)
        if sequence in self._open:
            promises, promised = self._open.pop(sequence)
            promises.count(promised, len(tokens) - 1)

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        promises = self._promises.setdefault(sampling.temperature, _Promises())
        self._head.limits = replace(self.limits, min_probability=min(self.worth / promises.factor, 0.9))
        draft = self._head.propose(sequence, path, budget, sampling, sample_index)
        self._open[sequence] = promises, sum(math.exp(score) for score in draft.scores)
        return draft

    def reset(self, sequence: int) -> None:
        self._open.pop(sequence, None)
        self._head.reset(sequence)
