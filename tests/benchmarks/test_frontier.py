"""γ for a share of 4-bit multiplications."""

from __future__ import annotations

import pytest

from benchmarks.frontier import gamma_for

COSTS = [(0.1, 10), (0.1, 5), (0.2, 30), (0.3, 25), (0.4, 30)]  # layers of one site have one value


def share(gamma: float) -> float:
    return sum(count for value, count in COSTS if value < gamma) / 100


@pytest.mark.parametrize(
    ("wanted", "found"), [(0.0, 0.0), (0.05, 0.0), (0.1, 0.15), (0.4829, 0.45), (0.6, 0.7), (0.86, 1.0), (1.0, 1.0)]
)
def test_the_nearest_share_that_keeps_sites_together_is_found(wanted: float, found: float) -> None:
    assert share(gamma_for(wanted, COSTS)) == pytest.approx(found)


def test_gamma_lies_between_two_values_so_that_rounding_decides_nothing() -> None:
    assert gamma_for(0.45, COSTS) == pytest.approx(0.25)
