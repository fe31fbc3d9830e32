"""Deciding a site: errors on layers with outliers, and the criteria."""

from __future__ import annotations

import pytest
import torch

from compress.flattenquant.choice import FlattenRule, choose_bits, decide, output_error, round_weights
from compress.flattenquant.flatten import flatten_codes
from compress.row_errors import relative_error

C, OUT = 576, 96


def site(seed: int = 0, outliers: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [400, C], some channels 30 times as large, and weights [OUT, C]."""
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(400, C, generator=generator), 0.05 * torch.randn(OUT, C, generator=generator)
    x[:, torch.randperm(C, generator=generator)[:outliers]] *= 30
    return x, W


def rule(**changes: object) -> FlattenRule:
    fields = {"beta": 1.3, "max_expansion": 1.5, "criterion": "error", "gamma": 0.3, "group_size": None}
    return FlattenRule(**(fields | changes))  # type: ignore[arg-type]


def activation_error(x: torch.Tensor, index: torch.Tensor, threshold: float, W: torch.Tensor) -> float:
    """Of the output, when only the inputs have 4 bits."""
    scale = threshold / 7
    copies = flatten_codes(torch.round(x / scale), index, 7) * scale
    return relative_error(x @ W.T, copies @ W[:, index].T)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_4_bit_inputs_is_at_least_halved_where_there_are_outliers(seed: int) -> None:
    x, W = site(seed)
    found = decide(x.abs().amax(0), x, [W], rule())
    plain = activation_error(x, torch.arange(C), float(x.abs().max()), W)
    ours = activation_error(x, found.index, found.threshold, W)
    assert plain > 0.2
    assert ours < plain / 2
    assert len(found.index) <= 1.5 * C + 32


def test_errors_are_those_of_the_rounded_layer() -> None:
    x, W = site()
    found = decide(x.abs().amax(0), x, [W], rule())
    for bits, largest in ((4, 7), (8, 127)):
        scale = found.threshold / largest
        columns = W[:, found.index]
        weight_scale = columns.abs().amax(1, keepdim=True) / largest
        rounded = torch.round(columns / weight_scale) * weight_scale
        copies = flatten_codes(torch.round(x / scale), found.index, largest) * scale
        assert found.errors[bits] == pytest.approx(relative_error(x @ W.T, copies @ rounded.T), rel=1e-5)
    assert found.errors[8] < found.errors[4] / 10


def test_the_worst_of_the_layers_that_read_a_site_decides() -> None:
    x, W = site()
    coarse = W.clone()
    coarse[:, 0] *= 100  # with 4 bits a scale per output channel leaves nothing of the others
    alone = [decide(x.abs().amax(0), x, [each], rule()).errors[4] for each in (W, coarse)]
    assert alone[0] < alone[1] / 2
    for weights in ([W, coarse], [coarse, W], [W, 0.001 * coarse]):
        assert decide(x.abs().amax(0), x, weights, rule()).errors[4] == pytest.approx(alone[1], rel=1e-4)


@pytest.mark.parametrize(
    ("criterion", "gamma", "bits"), [("error", 0.21, 4), ("error", 0.2, 8), ("ratio", 10.1, 4), ("ratio", 10.0, 8)]
)
def test_a_site_gets_4_bits_below_gamma(criterion: str, gamma: float, bits: int) -> None:
    assert choose_bits({4: 0.2, 8: 0.02}, criterion, gamma) == bits  # type: ignore[arg-type]


def test_the_scale_is_the_threshold_over_the_largest_code_of_the_chosen_bits() -> None:
    x, W = site()
    four, eight = (decide(x.abs().amax(0), x, [W], rule(gamma=gamma)) for gamma in (1.0, 0.0))
    assert (four.bits, eight.bits) == (4, 8)
    assert four.scale == pytest.approx(four.threshold / 7)
    assert eight.scale == pytest.approx(eight.threshold / 127)
    assert torch.equal(four.index, eight.index)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_columns_fill_whole_groups_and_smaller_groups_round_better(group_size: int | None) -> None:
    x, W = site()
    found = decide(x.abs().amax(0), x, [W], rule(group_size=group_size))
    assert len(found.index) % (group_size or 32) == 0
    columns = W[:, found.index]
    assert relative_error(columns, round_weights(columns, 4, group_size)) <= 1.001 * relative_error(
        columns, round_weights(columns, 4, None)
    )


def test_an_output_that_is_always_0_has_no_error() -> None:
    x, W = site()
    assert output_error(x, torch.zeros_like(W), torch.arange(C), 1.0, 4, None) == 0.0
