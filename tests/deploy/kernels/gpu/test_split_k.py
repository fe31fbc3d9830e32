"""Sums split among programs."""

import pytest
import torch

from deploy.kernels.gpu.split_k import (
    MIN_STEPS,
    TARGET_PROGRAMS,
    num_splits,
    plan_launch,
    reduce_partials,
    reduce_partials_reference,
)
from deploy.kernels.gpu.tiles import Tile


@pytest.mark.parametrize(
    ("num_out", "num_steps", "splits"),
    [(4096, 32, 4), (28672, 64, 1), (1024, 32, 8), (64, 7, 1), (64, 8, 2), (17, 1, 1)],
)
def test_small_layers_are_split_until_the_device_is_full_or_sums_get_short(
    num_out: int, num_steps: int, splits: int
) -> None:
    assert num_splits(num_out, num_steps) == splits
    assert splits == 1 or (num_steps // splits >= MIN_STEPS and num_out / 64 * splits / 2 < TARGET_PROGRAMS)


def test_prefill_keeps_the_partition_without_a_workspace() -> None:
    tile = Tile(16, 64, 4, 4)
    decode = plan_launch(tile, 33, torch.empty(5, 100), torch.float32)
    prefill = plan_launch(tile, 33, torch.empty(65, 100), torch.float32)
    assert (decode.grid, decode.parts, decode.steps) == ((1, 2, 8), 1, 5)
    assert (prefill.grid, prefill.parts, prefill.steps) == ((5, 2, 1), 8, 5)
    assert decode.partial is not None and decode.partial.shape == (8, 5, 100) and prefill.partial is None


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
def test_partial_sums_are_added_in_order(out_dtype: torch.dtype, with_bias: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    partial = torch.randn(4, 5, 1030, generator=generator).to(device)
    bias = torch.randn(1030, generator=generator).to(device) if with_bias else None
    out, expected = (torch.empty(5, 1030, dtype=out_dtype, device=device) for _ in range(2))
    assert torch.equal(reduce_partials(partial, out, bias), reduce_partials_reference(partial, expected, bias))


@pytest.mark.parametrize("num_scales", [3, 1])
def test_integer_sums_are_scaled_by_row_and_output(num_scales: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    partial = torch.randint(-(10**6), 10**6, (2, 3, 17), generator=generator, dtype=torch.int32).to(device)
    row_scale, out_scale = (torch.rand(n, generator=generator).to(device) for n in (num_scales, 17))
    out, expected = (torch.empty(3, 17, device=device) for _ in range(2))
    reduce_partials(partial, out, None, row_scale, out_scale)
    assert torch.equal(out, reduce_partials_reference(partial, expected, None, row_scale, out_scale))
