"""Quantized activations. Their products with weights are tested in test_epilogue.py."""

import numpy as np
import pytest
import torch

from deploy.kernels.gpu.w8a8 import (
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


def test_what_no_activations_have_is_refused_by_name(device: torch.device) -> None:
    x = random_x(3, 96, device)
    with pytest.raises(ValueError, match="bits=3 is not supported; use 4 or 8"):
        quantize_rows(x, bits=3)
    with pytest.raises(ValueError, match="a static scale is one float32"):
        quantize_static(x, torch.ones(3, device=device))
