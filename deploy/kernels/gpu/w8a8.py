"""Linear layer of 8-bit weights and 8-bit activations, and the quantization of activations.

Weights have one symmetric scale per output (SmoothQuant, FlattenQuant), activations one per row, chosen by the row's
largest value, or one for all, fixed by calibration. Sums are exact 32-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu.epilogue import check_per_output, launch_scaled, scaled_reference, store_scaled
from deploy.kernels.gpu.operands import OUT_TYPES, check_bias, check_input, check_static_scale
from deploy.kernels.gpu.tiles import DECODE_BUCKETS, PREFILL, Tile

# Inputs of one step: 128 bytes of a weight row, a whole cache line. Reasoned, not yet measured.
STEP = 128
TILES = {bucket: Tile(16, 64, 4, 4) for bucket in DECODE_BUCKETS if bucket <= 16} | {
    32: Tile(32, 64, 4, 4),
    64: Tile(64, 64, 4, 4),
    PREFILL: Tile(128, 128, 8, 3),
}
_QUANTIZE_BLOCK = 1024


@dataclass(frozen=True)
class W8:
    """A weight [num_out, num_in] on its device: w = scale·code. codes: int8. scale: fp32 [num_out]. bias: [num_out]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None

    @property
    def num_out(self) -> int:
        return self.codes.shape[0]

    @property
    def num_in(self) -> int:
        return self.codes.shape[1]


def pack_w8(weight: GroupedInt, device: torch.device | str, bias: Tensor | None = None) -> W8:
    """The weight as the kernel reads it; ValueError unless it has 8 bits and one symmetric scale per output."""
    check_per_output(weight, 8)
    check_bias(bias, weight.shape[0])
    codes = torch.from_numpy((weight.q ^ 0x80).view(np.int8)).to(device)
    scale = torch.from_numpy(np.ascontiguousarray(weight.scale[:, 0])).to(device)
    return W8(codes, scale, None if bias is None else bias.to(device))


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    static_scale_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_in: tl.tensor,
    LIMIT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if static_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(static_scale_ptr))
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for block in range(NUM_BLOCKS):
            x = tl.load(x_ptr + row * num_in + block * BLOCK + i, mask=block * BLOCK + i < num_in, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        absmax = tl.max(largest, axis=0)
        # Below 2^-100, whose inverse could overflow, all codes are 0 (docs/numerics.md).
        divisor = tl.where(absmax < 2.0**-100, float("inf"), absmax)
        inverse = tl.div_rn(LIMIT * 1.0, divisor)
        tl.store(scale_ptr + row, tl.where(absmax < 2.0**-100, 0.0, tl.div_rn(absmax, LIMIT * 1.0)))
    for block in range(NUM_BLOCKS):
        mask = block * BLOCK + i < num_in
        x = tl.load(x_ptr + row * num_in + block * BLOCK + i, mask=mask, other=0.0).to(tl.float32)
        bounded = tl.minimum(tl.maximum(x * inverse, -LIMIT * 1.0), LIMIT * 1.0)
        # Adding 1.5·2^23 leaves no bits for fractions, and rounds ties to even.
        rounded = (bounded + 12582912.0) - 12582912.0
        tl.store(codes_ptr + row * num_in + block * BLOCK + i, rounded.to(codes_ptr.dtype.element_ty), mask=mask)


def _quantize(x: Tensor, static_scale: Tensor | None, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} is not supported; use 4 or 8")
    check_input(x, x.shape[-1], OUT_TYPES)
    rows, num_in = x.shape
    codes = torch.empty((rows, num_in), dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device) if static_scale is None else static_scale
    limit = (1 << (bits - 1)) - 1
    _quantize_kernel[(rows,)](
        x,
        static_scale,
        codes,
        scale,
        num_in,
        LIMIT=limit,
        NUM_BLOCKS=triton.cdiv(num_in, _QUANTIZE_BLOCK),
        BLOCK=_QUANTIZE_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale


def quantize_rows(x: Tensor, bits: int = 8, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Activations as integers with a scale per row: absmax / 127 (of 4 bits: 7), ties to even (docs/numerics.md).

    x: fp16, bf16 or fp32 [rows, in]. Returns integers in `dtype` (int8, or a 16-bit type, which holds them exactly)
    [rows, in], and fp32 [rows].
    """
    return _quantize(x, None, bits, dtype)


def quantize_static(x: Tensor, scale: Tensor, bits: int = 8, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """The same with a given scale, fp32 [1], above 0: rint(x · (1/scale)); beyond ±127 (±7) cut off."""
    check_static_scale(scale)
    return _quantize(x, scale, bits, dtype)


def quantize_rows_reference(x: Tensor, bits: int = 8, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    absmax = x.to(torch.float32).abs().amax(dim=1)
    # As a tensor: torch turns a division of or by a number into a product with an inverse, rounded twice.
    limit = torch.full_like(absmax, (1 << (bits - 1)) - 1)
    is_tiny = absmax < 2.0**-100
    inverse = torch.where(is_tiny, 0.0, limit / absmax)
    codes = torch.round(x.to(torch.float32) * inverse[:, None]).to(dtype)
    return codes, torch.where(is_tiny, 0.0, absmax / limit)


def quantize_static_reference(
    x: Tensor, scale: Tensor, bits: int = 8, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    limit = (1 << (bits - 1)) - 1
    return torch.round((x.to(torch.float32) * scale.reciprocal()).clamp(-limit, limit)).to(dtype), scale


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    row_scale_stride: tl.tensor,
    STEP: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
) -> None:
    """See `Launch` for the grid. Sums are exact, so the order of their parts is of no account."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = tl.arange(0, STEP)
    weight_row = n.to(tl.int64)[:, None] * num_in
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.int32)
    for step in range(NUM_STEPS):
        i = (tl.program_id(2) * NUM_STEPS + step) * STEP + k
        is_weight = (n < num_out)[:, None] & (i < num_in)[None, :]
        is_x = (i < num_in)[:, None] & (m < num_rows)[None, :]
        w = tl.load(weight_ptr + weight_row + i[None, :], mask=is_weight, other=0)
        x = tl.load(x_ptr + m[None, :] * num_in + i[:, None], mask=is_x, other=0)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    store_scaled(
        acc, row_scale_ptr, out_scale_ptr, bias_ptr, out_ptr, n, m, num_rows, num_out, row_scale_stride, IS_PARTIAL
    )


def linear_w8a8(
    codes: Tensor,
    scale: Tensor,
    weight: W8,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(codes · weight codesᵀ) · weight scale · scale + bias, rounded in this order (docs/numerics.md).

    codes: int8 [rows, in]. scale: fp32 [rows], or [1] for all rows. Returns [rows, out] of `out_dtype`, in `out` where
    one is given. Raises ValueError where shapes or types do not fit.
    """
    return launch_scaled(_kernel, TILES, STEP, codes, scale, weight, out, out_dtype)


def linear_w8a8_reference(
    codes: Tensor,
    scale: Tensor,
    weight: W8,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return scaled_reference(codes, scale, weight.codes, weight, out, out_dtype)
