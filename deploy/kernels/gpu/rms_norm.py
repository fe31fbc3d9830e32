"""RMSNorm of docs/numerics.md, alone or after adding a layer's output to the residual stream.

One program normalizes one row. Its sum of squares is a tree over the whole row whose shape the row's length alone
decides, so a row's result never depends on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.interpreter import round_to

# Longest row → warps. By the row's length and not by the bucket: the shape of the sum depends on the warps.
CONFIGS = {512: 1, 1024: 2, 4096: 4, 16384: 8}


@triton.jit
def inverse_rms(squares: tl.tensor, n: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """1 / √(squares / n + eps), with IEEE division and square root; squares: sum over n elements."""
    mean = tl.div_rn(squares, n * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    eps: tl.tensor,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    mask = column < n
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + start + column, x, mask=mask)
    factor = inverse_rms(tl.sum(x * x, axis=0), n, eps)
    y = (x * factor) * tl.load(weight_ptr + column, mask=mask, other=0.0)
    tl.store(out_ptr + start + column, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    rows, n = x.shape
    num_warps = next((warps for longest, warps in CONFIGS.items() if n <= longest), None)
    if num_warps is None:
        raise ValueError(f"rms_norm: rows of {n} elements are longer than {max(CONFIGS)}; add an entry to CONFIGS")
    out = torch.empty_like(x, dtype=out_dtype)
    _rms_norm_kernel[(rows,)](
        x,
        delta,
        weight,
        out,
        n,
        eps,
        HAS_DELTA=delta is not None,
        BLOCK=triton.next_power_of_2(n),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """(x / √(mean(x²) + eps)) · weight of each row, [rows, n] in `out_dtype`.

    x: fp32 [rows, n]. weight: fp32 [n]. Raises ValueError for rows longer than CONFIGS knows.
    """
    return _launch(x, None, weight, eps, out_dtype)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Add `delta` to `residual` in place, and return the RMSNorm of the sum, [rows, n] in `out_dtype`.

    residual: fp32 [rows, n]. delta: [rows, n], 16 bits or fp32. Other arguments and errors as of `rms_norm`.
    """
    return _launch(residual, delta, weight, eps, out_dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
    return ((x * (1.0 / torch.sqrt(mean + eps))) * weight).to(out_dtype)


def add_rms_norm_reference(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    residual += delta.to(torch.float32)
    return rms_norm_reference(residual, weight, eps, out_dtype)
