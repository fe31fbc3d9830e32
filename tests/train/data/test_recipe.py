from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


@pytest.mark.parametrize(("share", "greedy"), [(0.0, 0), (0.75, 30), (0.9, 36), (1.0, 40)])
def test_a_share_of_the_held_out_is_greedy(tools: Any, share: float, greedy: int) -> None:
    recipe = tools.recipe(num_heldout=40, heldout_greedy_share=share, temperatures=(0.6, 1.0))
    found = [recipe.temperature(rank, rank) for rank in range(40)]
    assert sum(temperature == 0 for temperature in found) == greedy


def test_training_draws_from_all_temperatures_alike_and_independently_of_neighbours(tools: Any) -> None:
    recipe = tools.recipe(temperatures=(0.0, 0.6, 0.8, 1.0))
    found = [recipe.temperature(index, index) for index in range(5, 4005)]
    assert all(abs(count - 1000) < 120 for count in Counter(found).values())
    pairs = Counter(zip(found[::2], found[1::2], strict=True))
    assert len(pairs) == 16
    assert all(abs(count - 125) < 50 for count in pairs.values())


def test_the_seed_decides_the_temperatures(tools: Any) -> None:
    def found(seed: int) -> list[float]:
        return [tools.recipe(seed=seed).temperature(rank, rank) for rank in range(5, 60)]

    assert found(1) == found(1)
    assert found(1) != found(2)


def test_the_first_conversations_are_held_out_whatever_the_budget(tools: Any) -> None:
    for budget in (10, 10_000):
        recipe = tools.recipe(num_tokens=budget, num_heldout=2)
        assert [recipe.split(rank) for rank in range(4)] == ["heldout", "heldout", "train", "train"]
