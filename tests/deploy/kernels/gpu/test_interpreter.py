"""Conversions that Triton's interpreter gets wrong, done by bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from deploy.kernels.gpu.interpreter import operand, round_to


@triton.jit
def _round_kernel(x_ptr: tl.tensor, y_ptr: tl.tensor, COUNT: tl.constexpr) -> None:
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i, round_to(tl.load(x_ptr + i), y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr: tl.tensor, b_ptr: tl.tensor, y_ptr: tl.tensor) -> None:
    i, k = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(y_ptr + i * 16 + k, tl.dot(operand(tl.load(a_ptr + i * 16 + k)), operand(tl.load(b_ptr + i * 16 + k))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kernel_rounds_as_torch_does_ties_to_even(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    # 1 + n/512 lies on every second step halfway between two bfloat16 numbers.
    ties = 1 + torch.arange(512) / 512
    x = torch.cat((ties, -ties, 100 * torch.randn(1024, generator=generator))).to(device)
    y = torch.empty(2048, dtype=dtype, device=device)
    _round_kernel[(1,)](x, y, COUNT=2048)
    assert torch.equal(y, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dot_of_small_integers_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randint(-8, 9, (16, 16), generator=generator).to(dtype).to(device) for _ in range(2))
    y = torch.empty(16, 16, device=device)
    _dot_kernel[(1,)](a, b, y)
    assert torch.equal(y, (a.double() @ b.double()).float())
