"""Which sites get 4 bits: the criteria, and γ for a share of 4-bit multiplications."""

from __future__ import annotations

import pytest

from compress.flattenquant.bits import BitsRule, Cost, Criterion, criterion_value, gamma_for, int4_share

# With 4 bits a site may have other columns than with 8.
COSTS = [Cost(0.1, 15, 30), Cost(0.2, 30, 30), Cost(0.3, 25, 25), Cost(0.4, 30, 15)]


def share(gamma: float) -> float:
    """In words: 4-bit multiplications over all, each site counted with the columns of its own bits."""
    four = [cost.int4 for cost in COSTS if cost.value < gamma]
    eight = [cost.int8 for cost in COSTS if not cost.value < gamma]
    return sum(four) / (sum(four) + sum(eight))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.15, 0.25, 0.35, 0.5])
def test_a_share_counts_every_site_with_the_columns_of_its_own_bits(gamma: float) -> None:
    assert int4_share(gamma, COSTS) == pytest.approx(share(gamma))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(0.0, 0), (0.07, 0), (0.1, 15 / 85), (0.4829, 45 / 85), (0.7, 70 / 85), (0.95, 1), (1.0, 1)],
)
def test_the_nearest_share_is_found(wanted: float, found: float) -> None:
    assert share(gamma_for(wanted, COSTS)) == pytest.approx(found)


def test_gamma_lies_between_two_sites_so_that_rounding_decides_nothing() -> None:
    assert gamma_for(0.5, COSTS) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("criterion", "errors", "value"),
    [
        ("error", {4: 0.2, 8: 0.02}, 0.2),
        ("ratio", {4: 0.2, 8: 0.02}, 10.0),
        ("ratio", {4: 0.2, 8: 0.0}, float("inf")),  # 8 bits lose nothing: nothing is worth giving them up
    ],
)
def test_what_is_held_against_gamma(criterion: Criterion, errors: dict[int, float], value: float) -> None:
    assert criterion_value(errors, criterion) == pytest.approx(value)


def test_gamma_is_the_one_given_or_follows_from_the_share() -> None:
    assert BitsRule("error", 0.16, None).threshold(COSTS) == 0.16
    assert BitsRule("error", None, 0.5).threshold(COSTS) == gamma_for(0.5, COSTS)
    for gamma, wanted in ((0.16, 0.25), (None, None)):
        with pytest.raises(ValueError, match="one of them must be None"):
            BitsRule("error", gamma, wanted)
