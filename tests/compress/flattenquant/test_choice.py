"""What a site can have: errors on layers with outliers, and the search for a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.flattenquant.choice import Flattening, rounded_columns, site_options
from compress.flattenquant.flatten import copy_counts, counts_of, flatten_codes, flatten_index, flatten_threshold
from compress.flattenquant.search import (
    AS_GOOD,
    HEADROOM,
    SHRINKAGE,
    WIDENING,
    ReadingLayers,
    Seen,
    roomy_split,
    shrunk_splits,
    worst_error,
)
from compress.flattenquant.splits import FlattenRule, Split, mean_split, quantized_copies
from compress.row_errors import relative_error

C, OUT = 576, 96


def site(seed: int = 0, outliers: int = 6, kind: str = "gaussian") -> tuple[Tensor, Tensor]:
    """Inputs [400, C], some channels 30 times as large, and weights [OUT, C]."""
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(400, C, generator=generator), 0.05 * torch.randn(OUT, C, generator=generator)
    if kind == "laplacian":
        x *= (-2 * torch.rand(400, C, generator=generator).log()).sqrt()
    x[:, torch.randperm(C, generator=generator)[:outliers]] *= 30
    return x, W


def rule(**changes: object) -> FlattenRule:
    fields = {
        "beta": 1.3,
        "threshold": "mean",
        "max_expansion": 1.5,
        "group_size": None,
        "symmetric": True,
        "observer": "unused",
    }
    return FlattenRule(**(fields | changes))  # type: ignore[arg-type]


def halves(x: Tensor) -> list[Seen]:
    """Of the rows, as if each half were a sample."""
    return [Seen(part.abs().amax(0), part) for part in x.chunk(2)]


def nearest(W: Tensor, _inputs: Tensor, bits: int) -> Tensor:
    """Rounded to the nearest of 2^bits − 1 numbers, the largest absolute value of an output the last."""
    largest = (1 << (bits - 1)) - 1
    scale = W.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    return torch.round(W / scale) * scale


def nearest_in(group_size: int | None) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The same with a scale for each group, which columns must fill."""

    def rounded(W: Tensor, inputs: Tensor, bits: int) -> Tensor:
        assert inputs.shape[1] == W.shape[1]
        groups = W.unflatten(1, (-1, group_size or W.shape[1]))
        return nearest(groups.flatten(0, 1), inputs, bits).reshape(W.shape)

    return rounded


def as_they_are(W: Tensor, _inputs: Tensor, _bits: int) -> Tensor:
    return W


def assert_same_split(found: Split, expected: Split) -> None:
    assert found.threshold == expected.threshold
    assert torch.equal(found.index, expected.index)


def inputs_error(x: Tensor, W: Tensor, split: Split) -> float:
    """Of the output, when only inputs have 4 bits."""
    rounded = rounded_columns(x, [(W, None)], split, 4, as_they_are)
    return worst_error([x @ W.T], quantized_copies(x, split, 4), rounded, [None])


def brute_force_error(x: Tensor, W: Tensor, bias: Tensor | None, split: Split, bits: int) -> float:
    """√(mean ‖y − ŷ‖²/‖y‖²) in float64, channel by channel and copy by copy, with weights as `nearest` rounds them."""
    largest = (1 << (bits - 1)) - 1
    step = split.threshold / largest
    rounded = nearest(W, x, bits).double()
    y, approximate = x.double() @ W.double().T, torch.zeros(len(x), len(W), dtype=torch.float64)
    for channel, count in enumerate(torch.bincount(split.index).tolist()):
        codes = torch.round(x[:, channel] / step).double()
        held = codes.sign() * codes.abs().clamp(max=count * largest) * step
        approximate += held[:, None] * rounded[:, channel]
    if bias is not None:
        y, approximate = y + bias.double(), approximate + bias.double()
    ratios = (y - approximate).square().sum(1) / y.square().sum(1)
    return math.sqrt(float(ratios.mean()))


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_4_bit_inputs_is_at_least_halved_where_there_are_outliers(seed: int) -> None:
    x, W = site(seed)
    found = site_options(halves(x), [(W, None)], rule(), nearest)
    plain = Split(torch.arange(C), float(x.abs().max()))
    ours, theirs = (inputs_error(x, W, each) for each in (found.splits[4], plain))
    assert theirs > 0.2
    assert ours < theirs / 2
    assert len(found.splits[4].index) <= 1.5 * C + 32


@pytest.mark.parametrize("threshold", ["mean", "search"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_errors_are_those_of_the_rounded_layer_with_its_bias(threshold: str, has_bias: bool) -> None:
    x, W = site()
    bias = 3 * torch.randn(OUT, generator=torch.Generator().manual_seed(9)) if has_bias else None
    found = site_options(halves(x), [(W, bias)], rule(threshold=threshold), nearest)
    for bits in (4, 8):
        expected = brute_force_error(x, W, bias, found.splits[bits], bits)
        assert found.errors[bits] == pytest.approx(expected, rel=1e-3)
    assert found.errors[8] < found.errors[4] / 9


def test_the_worst_of_the_layers_that_read_a_site_decides() -> None:
    x, W = site()
    coarse = W.clone()
    coarse[:, 0] *= 100  # with 4 bits a scale per output channel leaves nothing of the others

    def error(*weights: Tensor) -> float:
        return site_options(halves(x), [(each, None) for each in weights], rule(), nearest).errors[4]

    assert error(W) < error(coarse) / 2
    for weights in ([W, coarse], [coarse, W], [W, 0.001 * coarse]):
        assert error(*weights) == pytest.approx(error(coarse), rel=1e-4)


def test_weights_are_rounded_by_the_models_rule_on_the_copies_that_they_will_read() -> None:
    x, W = site()
    seen = []

    def watched(columns: Tensor, inputs: Tensor, bits: int) -> Tensor:
        seen.append((columns.shape[1], inputs, bits))
        return nearest(columns, inputs, bits)

    found = site_options(halves(x), [(W, None)], rule(), watched)
    assert [(width, bits) for width, _, bits in seen] == [(len(found.splits[bits].index), bits) for bits in (4, 8)]
    for _, inputs, bits in seen:
        assert torch.equal(inputs, quantized_copies(x, found.splits[bits], bits))
    exact = site_options(halves(x), [(W, None)], rule(), as_they_are)
    assert exact.errors[4] < found.errors[4]


def test_the_scale_is_the_threshold_over_the_largest_code_of_the_chosen_bits() -> None:
    x, W = site()
    options = site_options(halves(x), [(W, None)], rule(threshold="search"), nearest)
    assert options.splits[4].threshold < options.splits[8].threshold
    four, eight = (Flattening(options, bits, 0.2) for bits in (4, 8))
    assert four.scale == options.splits[4].threshold / 7
    assert eight.scale == options.splits[8].threshold / 127
    assert four.split is options.splits[4]


def test_by_the_papers_rule_both_widths_split_alike_and_nothing_is_cut_off() -> None:
    x, W = site()
    m = x.abs().amax(0)
    found = site_options(halves(x), [(W, None)], rule(), nearest)
    expected = torch.ceil(m.double() / found.splits[4].threshold).clamp(min=1)
    assert torch.equal(found.splits[4].index, found.splits[8].index)
    assert found.splits[4].threshold == found.splits[8].threshold == flatten_threshold(m, 1.3)
    assert int((counts_of(found.splits[4].index) - expected).min()) >= 0
    assert len(found.splits[4].index) - int(expected.sum()) < 32


@pytest.mark.parametrize("kind", ["gaussian", "laplacian"])
@pytest.mark.parametrize("max_expansion", [1.3, 1.5, 3.0])
def test_4_bits_get_the_threshold_with_the_least_error_of_the_worst_layer(kind: str, max_expansion: float) -> None:
    x, W = site(1, kind=kind)
    x, layers = x[:150], [(W, None), (W.roll(1, 1), None)]
    m, how = x.abs().amax(0), rule(threshold="search", max_expansion=max_expansion)
    found = site_options(halves(x), layers, how, nearest)
    candidates = [mean_split(m, how), *shrunk_splits(m, how)]
    errors = [max(brute_force_error(x, W, None, each, 4) for W, _ in layers) for each in candidates]
    assert found.errors[4] == pytest.approx(min(errors), rel=1e-3)
    assert found.splits[4].threshold == candidates[errors.index(min(errors))].threshold


@pytest.mark.parametrize("kind", ["gaussian", "laplacian"])
@pytest.mark.parametrize("max_expansion", [1.3, 3.0])
def test_8_bits_get_what_loses_least_on_one_half_by_the_other(kind: str, max_expansion: float) -> None:
    """Among all thresholds and rooms within the cap, by brute force; the fewest columns of those that are as good."""
    x, W = site(4, kind=kind)
    how, parts = rule(threshold="search", max_expansion=max_expansion), halves(x)
    m, paper = x.abs().amax(0), mean_split(x.abs().amax(0), how).threshold
    errors = {}
    for widening in WIDENING:
        for room in HEADROOM:
            t = widening * paper
            if int(copy_counts(room * m, t).sum()) > max_expansion * C:
                continue
            errors[t, room] = sum(
                brute_force_error(here.rows, W, None, Split(flatten_index(copy_counts(room * there, t)), t), 8)
                for here, there in ((parts[0], parts[1].channel_max), (parts[1], parts[0].channel_max))
            )
    good = [key for key, error in errors.items() if error <= AS_GOOD * min(errors.values())]
    columns = {key: int(copy_counts(key[1] * m, key[0]).sum()) for key in good}
    expected = min(columns, key=columns.__getitem__)
    found = roomy_split(parts, ReadingLayers([W], [nearest(W, x, 8)], [None]), how)
    assert found.threshold == expected[0]
    assert columns[expected] <= len(found.index) < columns[expected] + 32
    assert site_options(parts, [(W, None)], how, nearest).splits[8].threshold == found.threshold


@pytest.mark.parametrize("seed", range(3))
def test_8_bits_hold_what_calibration_did_not_see(seed: int) -> None:
    """Rare large values in every channel: rows that were not calibrated on have larger ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1200, C, generator=generator) ** 3
    W = 0.05 * torch.randn(OUT, C, generator=generator)
    errors = {}
    for threshold in ("mean", "search"):
        split = site_options(halves(x[:200]), [(W, None)], rule(threshold=threshold), nearest).splits[8]
        errors[threshold] = brute_force_error(x[200:], W, None, split, 8)
    assert errors["search"] < 0.75 * errors["mean"]


def test_one_sample_has_no_halves_and_8_bits_keep_the_papers_threshold() -> None:
    x, W = site()
    seen = Seen(x.abs().amax(0), x)
    found, papers = (site_options([seen], [(W, None)], rule(threshold=t), nearest) for t in ("search", "mean"))
    assert_same_split(found.splits[8], papers.splits[8])


@pytest.mark.parametrize("kind", ["gaussian", "laplacian"])
def test_a_searched_threshold_rounds_inputs_better_than_the_papers(kind: str) -> None:
    x, W = site(2, kind=kind)
    errors = {}
    for threshold in ("mean", "search"):
        found = site_options(halves(x), [(W, None)], rule(threshold=threshold), nearest)
        errors[threshold] = inputs_error(x, W, found.splits[4])
    assert errors["search"] < 0.75 * errors["mean"]


@pytest.mark.parametrize("max_expansion", [1.0, 1.2, 1.5, 3.0])
def test_candidates_never_cut_outliers_off_and_keep_the_cap(max_expansion: float) -> None:
    x, _ = site(3)
    m = x.abs().amax(0)
    how = rule(threshold="search", max_expansion=max_expansion)
    q1, q3 = torch.quantile(m.double(), torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    is_outlier = m > q3 + 1.5 * (q3 - q1)
    splits = shrunk_splits(m, how)
    assert 6 <= int(is_outlier.sum()) < C // 4
    for split in splits:
        counts = counts_of(split.index)
        assert bool((counts[is_outlier] * split.threshold >= m[is_outlier] * (1 - 1e-12)).all())
        assert len(split.index) % 32 == 0
        assert len(split.index) <= max_expansion * C + 31
    tried = [split.threshold / flatten_threshold(m, how.beta) for split in splits]
    assert tried == pytest.approx(list(SHRINKAGE[: len(splits)]))
    assert bool(splits) == (max_expansion > 1.2)


def test_without_a_candidate_under_the_cap_the_papers_rule_stays() -> None:
    x, W = site()
    found, papers = (
        site_options(halves(x), [(W, None)], rule(threshold=threshold, max_expansion=1.0), nearest)
        for threshold in ("search", "mean")
    )
    assert_same_split(found.splits[4], papers.splits[4])
    assert found.errors[4] == papers.errors[4]
    assert len(found.splits[8].index) == C  # wider, with one copy of each


@pytest.mark.parametrize("threshold", ["mean", "search"])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_columns_fill_whole_groups(group_size: int | None, threshold: str) -> None:
    x, W = site()
    found = site_options(
        halves(x), [(W, None)], rule(group_size=group_size, threshold=threshold), nearest_in(group_size)
    )
    for split in found.splits.values():
        assert len(split.index) % (group_size or 32) == 0


def test_copies_are_codes_times_their_scale() -> None:
    x, W = site()
    split = site_options(halves(x), [(W, None)], rule(), nearest).splits[4]
    scale = split.threshold / 7
    assert torch.equal(quantized_copies(x, split, 4), flatten_codes(torch.round(x / scale), split.index, 7) * scale)
    held = torch.zeros_like(x).index_add_(1, split.index, quantized_copies(x, split, 4))
    assert relative_error(x, held) < 0.25


def test_an_output_that_is_always_0_has_no_error() -> None:
    x, W = site()
    assert inputs_error(x, torch.zeros_like(W), Split(torch.arange(C), 1.0)) == 0.0
