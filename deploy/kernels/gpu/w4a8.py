"""Linear layer of 4-bit weights and 8- or 4-bit activations, both as int8 in the product.

Weights have one symmetric scale per output (FlattenQuant's W4A4 and W4A8 layers). Hopper has no 4-bit product: 4-bit
activations are `quantize_rows` or `quantize_static` of w8a8.py with bits=4, and what 4 bits save here is weight bytes.
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
from deploy.kernels.gpu.operands import check_bias
from deploy.kernels.gpu.packing import pack_halves, unpack_halves
from deploy.kernels.gpu.tiles import DECODE_BUCKETS, PREFILL, Tile

# Inputs of one step, and of a block of the packed layout: two int8 dots of 64. Reasoned, not yet measured.
STEP = 128
TILES = {bucket: Tile(16, 64, 4, 4) for bucket in DECODE_BUCKETS if bucket <= 16} | {
    32: Tile(32, 64, 4, 4),
    64: Tile(64, 64, 4, 4),
    PREFILL: Tile(128, 128, 8, 3),
}
_ZERO = 8


@dataclass(frozen=True)
class W4Channel:
    """A weight [num_out, num_in] on its device: w = scale·(code − 8).

    codes: uint8 [⌈in/128⌉, num_out, 64], see packing.py. scale: fp32 [num_out]. bias: [num_out].
    """

    codes: Tensor
    scale: Tensor
    num_in: int
    bias: Tensor | None = None

    @property
    def num_out(self) -> int:
        return self.codes.shape[1]


def pack_w4_channel(weight: GroupedInt, device: torch.device | str, bias: Tensor | None = None) -> W4Channel:
    """The weight as the kernel reads it; ValueError unless it has 4 bits and one symmetric scale per output."""
    check_per_output(weight, 4)
    check_bias(bias, weight.shape[0])
    codes = pack_halves(weight.q, STEP, padding=_ZERO).to(device)
    scale = torch.from_numpy(np.ascontiguousarray(weight.scale[:, 0])).to(device)
    return W4Channel(codes, scale, weight.shape[1], None if bias is None else bias.to(device))


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
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
    HALF: tl.constexpr = STEP // 2
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    j = tl.arange(0, HALF)
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.int32)
    for step in range(NUM_STEPS):
        block = tl.program_id(2) * NUM_STEPS + step
        # Where activations are masked, here or in a block behind the last, the weight is of no account.
        is_weight = n < tl.where(block * STEP < num_in, num_out, 0)
        octet_ptrs = codes_ptr + (block * num_out + n)[:, None] * HALF + j[None, :]
        octets = tl.load(octet_ptrs, mask=is_weight[:, None], other=0)
        low, high = (octets & 0xF).to(tl.int8) - 8, (octets >> 4).to(tl.int8) - 8
        i = block * STEP + j
        x_ptrs = x_ptr + m[None, :] * num_in + i[:, None]
        x_low = tl.load(x_ptrs, mask=(i < num_in)[:, None] & (m < num_rows)[None, :], other=0)
        x_high = tl.load(x_ptrs + HALF, mask=(i + HALF < num_in)[:, None] & (m < num_rows)[None, :], other=0)
        acc = tl.dot(low, x_low, acc, out_dtype=tl.int32)
        acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
    store_scaled(
        acc, row_scale_ptr, out_scale_ptr, bias_ptr, out_ptr, n, m, num_rows, num_out, row_scale_stride, IS_PARTIAL
    )


def linear_w4a8(
    codes: Tensor,
    scale: Tensor,
    weight: W4Channel,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(codes · (weight codes − 8)ᵀ) · weight scale · scale + bias, rounded in this order (docs/numerics.md).

    codes: int8 [rows, in], of 8- or 4-bit activations. scale: fp32 [rows], or [1] for all rows. Returns [rows, out] of
    `out_dtype`, in `out` where one is given. Raises ValueError where shapes or types do not fit.
    """
    return launch_scaled(_kernel, TILES, STEP, codes, scale, weight, out, out_dtype)


def linear_w4a8_reference(
    codes: Tensor,
    scale: Tensor,
    weight: W4Channel,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    integers = unpack_halves(weight.codes, weight.num_in).to(torch.int32) - _ZERO
    return scaled_reference(codes, scale, integers, weight, out, out_dtype)
