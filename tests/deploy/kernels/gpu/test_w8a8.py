"""Quantized activations, and 8-bit weights with them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deploy.kernels.gpu import epilogue, split_k
from deploy.kernels.gpu.w8a8 import (
    linear_w8a8,
    linear_w8a8_reference,
    pack_w8,
    quantize_rows,
    quantize_rows_reference,
    quantize_static,
    quantize_static_reference,
)


def random_x(rows: int, num_in: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, num_in, generator=torch.Generator().manual_seed(0)).to(device)


def slow_quantize(row: np.ndarray, limit: int) -> tuple[list[int], np.float32]:
    """docs/numerics.md, by one fp32 operation after another; Python rounds ties to even."""
    largest = max(abs(value) for value in row)
    if largest < np.float32(2.0**-100):
        return [0] * len(row), np.float32(0)
    inverse = np.float32(limit) / largest
    return [round(float(value * inverse)) for value in row], largest / np.float32(limit)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_quantized_by_their_largest_value(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    x = random_x(3, 1100, device).to(dtype)
    x[2] = 0
    codes, scale = quantize_rows(x, bits)
    for row in range(3):
        expected, expected_scale = slow_quantize(x[row].cpu().float().numpy(), (1 << (bits - 1)) - 1)
        assert codes[row].tolist() == expected
        assert scale[row].item() == expected_scale
    reference_codes, reference_scale = quantize_rows_reference(x, bits)
    assert torch.equal(codes, reference_codes) and torch.equal(scale, reference_scale)


def test_ties_go_to_even(device: torch.device) -> None:
    codes, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], device=device))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_a_static_scale_cuts_off_what_does_not_fit(bits: int, limit: int, device: torch.device) -> None:
    x, scale = random_x(3, 1100, device), torch.tensor([1.5 / limit], device=device)
    codes, returned = quantize_static(x, scale, bits)
    assert returned is scale
    assert (codes.min().item(), codes.max().item()) == (-limit, limit)
    assert torch.equal(codes, quantize_static_reference(x, scale, bits)[0])
    assert (codes.float() * scale - x.clamp(-1.5, 1.5)).abs().max() <= 0.5001 * scale


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in"), [(1, 17, 96), (5, 70, 576), (17, 65, 100), (65, 17, 96), (9, 33, 1100)]
)
def test_a_layer_is_exact(
    rows: int, num_out: int, num_in: int, out_dtype: torch.dtype, make_per_output: Any, device: torch.device
) -> None:
    weight = make_per_output(np.random.default_rng(1), num_out, num_in, 8)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2))
    packed = pack_w8(weight, device, bias)
    codes, scale = quantize_rows(random_x(rows, num_in, device))
    y = linear_w8a8(codes, scale, packed, out_dtype=out_dtype)
    assert torch.equal(y, linear_w8a8_reference(codes, scale, packed, out_dtype=out_dtype))
    dequantized = codes.cpu().double() * scale.cpu().double()[:, None]
    expected = dequantized @ torch.from_numpy(weight.dequantize()).double().T + bias
    accuracy = torch.finfo(out_dtype).eps
    torch.testing.assert_close(y.cpu().double(), expected, rtol=2 * accuracy, atol=1e-5)


@pytest.mark.parametrize("num_in", [576, 1100])
def test_a_row_alone_equals_the_row_in_any_bucket(num_in: int, make_per_output: Any, device: torch.device) -> None:
    packed = pack_w8(make_per_output(np.random.default_rng(1), 40, num_in, 8), device)
    codes, scale = quantize_rows(random_x(70, num_in, device))
    alone = linear_w8a8(codes[3:4], scale[3:4], packed)
    for rows in (16, 17, 64, 70):
        together = linear_w8a8(codes[:rows].contiguous(), scale[:rows].contiguous(), packed)
        assert torch.equal(together[3:4], alone), f"{rows} rows"


def test_one_scale_serves_all_rows_and_splitting_changes_nothing(
    make_per_output: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_w8(make_per_output(np.random.default_rng(1), 17, 1100, 8), device)
    codes, scale = quantize_static(random_x(5, 1100, device), torch.tensor([0.03], device=device))
    assert split_k.num_splits(17, 9) == 2
    split = linear_w8a8(codes, scale, packed)
    monkeypatch.setattr(split_k, "TARGET_PROGRAMS", 1)
    assert torch.equal(split, linear_w8a8(codes, scale, packed))
    assert torch.equal(split, linear_w8a8(codes, scale.repeat(5), packed))


def test_what_does_not_fit_is_refused_by_name(
    tiny: Any, make_per_output: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    packed = pack_w8(make_per_output(rng, 17, 96, 8), device)
    codes, scale = quantize_rows(random_x(3, 96, device))
    with pytest.raises(ValueError, match=r"scale is torch.float32 \[2\]; 3 rows need float32 \[3\], or \[1\]"):
        linear_w8a8(codes, scale[:2], packed)
    with pytest.raises(ValueError, match=r"x is torch.float32; use torch.int8"):
        linear_w8a8(codes.float(), scale, packed)
    with pytest.raises(ValueError, match="bits=3 is not supported; use 4 or 8"):
        quantize_rows(random_x(3, 96, device), bits=3)
    with pytest.raises(ValueError, match="a static scale is one float32"):
        quantize_static(random_x(3, 96, device), scale)
    with pytest.raises(ValueError, match=r"8 bits in symmetric groups of 32 .* one symmetric scale per output"):
        pack_w8(tiny.grouped(rng, 17, 96, tiny.Quantized(8, 32, "symmetric")), device)
    with pytest.raises(ValueError, match=r"8 bits in asymmetric groups of 96"):
        pack_w8(tiny.grouped(rng, 17, 96, tiny.Quantized(8, 96, "minimum")), device)
    monkeypatch.setattr(epilogue, "MAX_INPUTS", 64)
    with pytest.raises(ValueError, match="in_features=96 could overflow 32-bit sums"):
        pack_w8(make_per_output(rng, 17, 96, 8), device)
