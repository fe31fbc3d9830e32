"""Splitting channels: the identity, counts, thresholds and padding, against definitions written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.flattenquant import flatten as f

C = 43


def inputs(seed: int, *, outliers: int = 0) -> torch.Tensor:
    """[57, C] normal values in float64, some channels 30 times as large."""
    x = torch.randn(57, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, torch.randperm(C, generator=torch.Generator().manual_seed(seed))[:outliers]] *= 30
    return x


def flattened(x: torch.Tensor, beta: float = 1.3, multiple: int = 32) -> tuple[torch.Tensor, float]:
    m = x.abs().amax(0)
    threshold = f.flatten_threshold(m, beta)
    return f.flatten_index(f.padded_counts(m, f.copy_counts(m, threshold), threshold, multiple)), threshold


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outliers", [0, 1, 5])
@pytest.mark.parametrize("beta", [0.3, 1.3])
def test_a_flattened_layer_computes_what_the_layer_did(seed: int, outliers: int, beta: float) -> None:
    x, W = inputs(seed, outliers=outliers), inputs(seed + 9)[:17]
    index, threshold = flattened(x, beta)
    exact, ours = x @ W.T, f.flatten(x, index, threshold) @ W[:, index].T
    assert float((exact - ours).norm() / exact.norm()) < 1e-6
    assert float(f.flatten(x, index, threshold).abs().max()) <= threshold * (1 + 1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_copies_of_codes_sum_to_the_code_exactly_and_each_fits_its_bits(bits: int) -> None:
    qmax = (1 << (bits - 1)) - 1
    x = inputs(1, outliers=4)
    index, threshold = flattened(x)
    codes = torch.round(x / (threshold / qmax))
    copies = f.flatten_codes(codes, index, qmax)
    assert int(copies.abs().max()) == qmax
    for channel in range(C):
        assert torch.equal(copies[:, index == channel].sum(1), codes[:, channel])


def test_beyond_its_copies_a_channel_saturates_with_its_sign() -> None:
    index = torch.tensor([0, 0, 1])
    copies = f.flatten_codes(torch.tensor([[20.0, -9.0], [-20.0, 3.0]]), index, 7)
    assert copies.tolist() == [[7, 7, -7], [-7, -7, 3]]


def test_the_copies_of_a_code_are_taken_from_the_first_on() -> None:
    index = torch.tensor([0, 0, 0])
    assert f.flatten_codes(torch.tensor([[9.0], [-16.0], [0.0]]), index, 7).tolist() == [
        [7, 2, 0],
        [-7, -7, -2],
        [0, 0, 0],
    ]


def test_the_threshold_leaves_a_boxplots_outliers_out() -> None:
    m = inputs(2, outliers=6).abs().amax(0)
    q1, q3 = np.percentile(m, [25, 75])
    kept = [value for value in m.tolist() if value <= q3 + 1.5 * (q3 - q1)]
    assert len(kept) <= C - 6
    assert f.flatten_threshold(m, 1.3) == pytest.approx(1.3 * sum(kept) / len(kept), rel=1e-12)


def test_counts_are_enough_and_one_less_is_not() -> None:
    m, threshold = inputs(3, outliers=5).abs().amax(0), 0.7
    for count, largest in zip(f.copy_counts(m, threshold).tolist(), m.tolist(), strict=True):
        assert count == max(1, math.ceil(largest / threshold))


@pytest.mark.parametrize("threshold", [0.7, 2.0, 9.0])
def test_only_outliers_of_a_boxplot_are_split_where_ordinary_channels_may_be_cut_off(threshold: float) -> None:
    m = inputs(3, outliers=5).abs().amax(0)
    q1, q3 = np.percentile(m, [25, 75])
    fence = q3 + 1.5 * (q3 - q1)
    assert f.boxplot_fence(m) == pytest.approx(fence, rel=1e-12)
    for count, largest in zip(f.outlier_counts(m, threshold).tolist(), m.tolist(), strict=True):
        assert count == (max(1, math.ceil(largest / threshold)) if largest > fence else 1)


@pytest.mark.parametrize("cap", [1.0, 1.1, 1.5, 3.0])
def test_the_cap_raises_the_threshold_no_further_than_needed(cap: float) -> None:
    m = inputs(4, outliers=8).abs().amax(0)
    start = f.flatten_threshold(m, 0.4)
    found = f.capped_threshold(m, start, cap)
    assert int(f.copy_counts(m, found).sum()) <= cap * C
    if found > start:
        assert int(f.copy_counts(m, found * (1 - 1e-6)).sum()) > cap * C


def test_at_a_cap_of_one_nothing_is_split() -> None:
    m = inputs(5, outliers=3).abs().amax(0)
    threshold = f.capped_threshold(m, f.flatten_threshold(m, 1.3), 1.0)
    assert threshold == pytest.approx(float(m.max()), rel=1e-6)
    assert f.copy_counts(m, threshold).tolist() == [1] * C


@pytest.mark.parametrize("multiple", [32, 64])
def test_padding_goes_to_the_channels_nearest_to_saturation(multiple: int) -> None:
    m, threshold = inputs(6, outliers=5).abs().amax(0), 2.0
    counts = f.copy_counts(m, threshold)
    padded = f.padded_counts(m, counts, threshold, multiple)
    assert int(padded.sum()) % multiple == 0
    assert 0 <= int((padded - counts).sum()) < multiple
    fullness = m / (counts * threshold)
    grown = padded > counts
    if grown.any() and not grown.all():
        assert float(fullness[grown].min()) >= float(fullness[~grown].max()) - 1e-12


def test_the_index_holds_every_channel_in_order() -> None:
    counts = torch.tensor([1, 3, 1, 2])
    index = f.flatten_index(counts)
    assert index.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert f.copy_numbers(index).tolist() == [0, 0, 1, 2, 0, 0, 1]
    assert torch.equal(f.counts_of(index), counts)


def test_a_site_that_never_saw_anything_has_a_threshold() -> None:
    assert f.flatten_threshold(torch.zeros(C), 1.3) == 1.0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: f.flatten_threshold(m, 0.0), "beta=0.0"),
        (lambda m: f.copy_counts(m, -1.0), "threshold=-1.0"),
        (lambda m: f.outlier_counts(m, 0.0), "threshold=0.0"),
        (lambda m: f.capped_threshold(m, 1.0, 0.9), "max_expansion=0.9"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.ones(3))  # type: ignore[operator]
