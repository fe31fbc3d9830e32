"""Which sites get 4 bits: two criteria, and the γ that puts a share of the model's multiplications in 4 bits.

By the criterion `ratio` (the paper's, arXiv 2402.17985) a site gets 4 bits where error_4 < γ · error_8; by the
criterion `error` where error_4 < γ. With uniform grids of 7 and of 127 steps the ratios say little, and the smallest
belong to the sites that 8 bits serve worst, so the second criterion is there (docs/methods.md).

γ says little by itself: what share it comes to differs from model to model. Where a share is asked for instead, γ
follows from every site's errors, so it is known only when all have been measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Criterion = Literal["ratio", "error"]


@dataclass(frozen=True)
class Cost:
    """One site. value: its errors under the criterion; int4, int8: its multiplications a token with either bits."""

    value: float
    int4: int
    int8: int


@dataclass(frozen=True)
class BitsRule:
    """Sites whose value is below a γ get 4 bits: `gamma`, or where that is None the one for `int4_share`."""

    criterion: Criterion
    gamma: float | None
    int4_share: float | None

    def __post_init__(self) -> None:
        if (self.gamma is None) == (self.int4_share is None):
            raise ValueError(f"gamma={self.gamma} and int4_share={self.int4_share}: one of them must be None")

    def threshold(self, costs: Sequence[Cost]) -> float:
        """γ for a model of sites with these costs."""
        if self.gamma is not None:
            return self.gamma
        assert self.int4_share is not None
        return gamma_for(self.int4_share, costs)


def criterion_value(errors: Mapping[int, float], criterion: Criterion) -> float:
    """What is held against γ. errors: bits → relative error of the site's worst layer."""
    if criterion == "error":
        return errors[4]
    return errors[4] / errors[8] if errors[8] else float("inf")


def int4_share(gamma: float, costs: Sequence[Cost]) -> float:
    """Of all multiplications, those of sites whose value is below `gamma`, which have 4 bits."""
    int4 = sum(cost.int4 for cost in costs if cost.value < gamma)
    return int4 / (int4 + sum(cost.int8 for cost in costs if cost.value >= gamma))


def gamma_for(share: float, costs: Sequence[Cost]) -> float:
    """The γ whose share of multiplications in 4 bits is nearest to `share`, between two sites' values.

    The shares that there are lie as far apart as the sites are large.
    """
    values = sorted({cost.value for cost in costs})
    between = [(a + b) / 2 for a, b in pairwise(values)]
    candidates = [0.0, *between, values[-1] * 1.01]
    return min(candidates, key=lambda gamma: abs(int4_share(gamma, costs) - share))
