"""Linear layer of 4-bit weights in groups and 16-bit activations: the `bf16` form of docs/numerics.md.

Weights are dequantized in fp32 and rounded to the type of x; products are summed in fp32, in an order that depends on
the layer's shape alone. Bias is added in fp32, before the result is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu.epilogue import store_sums
from deploy.kernels.gpu.interpreter import INTERPRETED, operand, round_to
from deploy.kernels.gpu.linear16 import linear_16_reference
from deploy.kernels.gpu.operands import HALF_TYPES, check_bias, check_input, output_for, resolve_dtype
from deploy.kernels.gpu.packing import pack_halves, unpack_halves
from deploy.kernels.gpu.split_k import plan_launch, reduce_partials
from deploy.kernels.gpu.tiles import DECODE_BUCKETS, PREFILL, Tile, tile_for

GROUP_SIZES = (32, 64, 128)
# Inputs of one step, whole groups of them: the same in all buckets, since it decides the order of the sum. 128 inputs
# of 64 outputs are 4 KB; four stages of it, two programs to a multiprocessor, keep 32 KB a multiprocessor on the way,
# where an H100 needs some 15 (3.3 TB/s for 0.6 µs). Buckets up to 16 share a tile: narrower dots read no fewer weights.
# Reasoned, not yet measured. As compiled for an H100 the loop has 6 instructions a weight (5 with 128 outputs to a
# program); memory delivers a weight to a multiprocessor in the time of 4.6, so the first thing to measure is one row.
STEP = 128
TILES = {bucket: Tile(16, 64, 4, 4) for bucket in DECODE_BUCKETS if bucket <= 16} | {
    32: Tile(32, 64, 4, 4),
    64: Tile(64, 64, 4, 3),
    PREFILL: Tile(128, 128, 8, 3),
}


@dataclass(frozen=True)
class W4:
    """A weight [num_out, num_in] on its device: w = scale·(code − zero point), or scale·code + minimum.

    codes: uint8 [groups, num_out, group_size/2], see packing.py. scale: [groups, num_out], of the smallest type that
    holds it exactly. zero_point: uint8 [groups, num_out]; None with no minimum either: 8 everywhere. minimum: as scale.
    bias: [num_out].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None
    num_out: int
    num_in: int
    group_size: int
    bias: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of device memory, which is also what a call with few rows reads."""
        tensors = (self.codes, self.scale, self.zero_point, self.minimum, self.bias)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _exact(values: Tensor, preferred: torch.dtype) -> Tensor:
    """`values` (fp32) in the first type that changes none of them: `preferred`, the other of 16 bits, float32."""
    for dtype in (preferred, *HALF_TYPES):
        stored = values.to(dtype)
        if torch.equal(stored.to(torch.float32), values):
            return stored
    return values


def pack_w4(
    weight: GroupedInt, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None
) -> W4:
    """Lay out a weight as the kernel reads it.

    dtype: of scales and minima, where it holds them without changing any; otherwise another is taken.
    Raises ValueError unless the weight has 4 bits in groups of 32, 64 or 128.
    """
    if weight.bits != 4 or weight.group_size not in GROUP_SIZES:
        raise ValueError(
            f"bits={weight.bits} in groups of {weight.group_size} do not fit linear_w4a16, which takes 4 bits in "
            f"groups of {GROUP_SIZES}; dequantize the weight for linear_16"
        )
    num_out, num_in = weight.shape
    check_bias(bias, num_out)
    by_group = [torch.from_numpy(np.ascontiguousarray(array.T)) for array in (weight.scale, weight.minimum)]
    zero_point = minimum = None
    if weight.zero_point is None:
        minimum = _exact(by_group[1], dtype).to(device)
    elif np.any(weight.zero_point != 8):
        zero_point = torch.from_numpy(np.ascontiguousarray(weight.zero_point.T)).to(device)
    return W4(
        codes=pack_halves(weight.q, weight.group_size).to(device),
        scale=_exact(by_group[0], dtype).to(device),
        zero_point=zero_point,
        minimum=minimum,
        num_out=num_out,
        num_in=num_in,
        group_size=weight.group_size,
        bias=None if bias is None else bias.to(device),
    )


@triton.jit
def _centred(octets: tl.tensor, zero: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """code − zero in `dtype` (fp32 where bfloat16 is interpreted), exact; both uint8 below 16.

    Below the exponent of 1024 (fp16) or 128 (bf16), a code is the last bits of a number's own: an OR and a subtraction
    in 16 bits, where conversions have a quarter of the throughput (as in FasterTransformer and Marlin).
    """
    if INTERPRETED and dtype == tl.bfloat16:
        return octets.to(tl.float32) - zero.to(tl.float32)
    else:
        EXPONENT: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        code = (octets.to(tl.uint16) | EXPONENT).to(dtype, bitcast=True)
        return code - (zero.to(tl.uint16) | EXPONENT).to(dtype, bitcast=True)


@triton.jit
def _scaled(centred: tl.tensor, scale: tl.tensor, minimum: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """scale · centred (+ minimum) computed in fp32 and rounded to `dtype`.

    A product of two 16-bit numbers that is rounded once may as well be computed in 16 bits.
    """
    if minimum is not None:
        return round_to(centred.to(tl.float32) * scale.to(tl.float32) + minimum.to(tl.float32), dtype)
    elif centred.dtype == dtype and scale.dtype == dtype:
        return centred * scale
    else:
        return round_to(centred.to(tl.float32) * scale.to(tl.float32), dtype)


@triton.jit
def _sum_of_steps(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    num_groups: tl.tensor,
    first_group: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
) -> tl.tensor:
    """fp32 [BLOCK_OUT, BLOCK_ROWS]: the sum over NUM_STEPS steps from `first_group` on."""
    HALF: tl.constexpr = GROUP // 2
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    j = tl.arange(0, HALF)
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for step in range(NUM_STEPS):
        for part in tl.static_range(GROUPS_PER_STEP):
            group = first_group + step * GROUPS_PER_STEP + part
            # Behind the last group nothing is read. (A scalar condition & a block's is wrong in the interpreter.)
            is_weight = n < tl.where(group < num_groups, num_out, 0)
            is_x = m < tl.where(group < num_groups, num_rows, 0)
            per_group = group * num_out + n
            octets = tl.load(codes_ptr + per_group[:, None] * HALF + j[None, :], mask=is_weight[:, None], other=0)
            scale = tl.load(scale_ptr + per_group, mask=is_weight, other=0.0)[:, None]
            minimum = None
            zero = tl.full([1, 1], 0 if minimum_ptr is not None else 8, tl.uint8)
            if minimum_ptr is not None:
                minimum = tl.load(minimum_ptr + per_group, mask=is_weight, other=0.0)[:, None]
            elif zero_ptr is not None:
                zero = tl.load(zero_ptr + per_group, mask=is_weight, other=0)[:, None]
            x_ptrs = x_ptr + m[None, :] * num_in + group * GROUP + j[:, None]
            x_low = operand(tl.load(x_ptrs, mask=is_x[None, :], other=0.0))
            x_high = operand(tl.load(x_ptrs + HALF, mask=is_x[None, :], other=0.0))
            low = _scaled(_centred(octets & 0xF, zero, dtype), scale, minimum, dtype)
            high = _scaled(_centred(octets >> 4, zero, dtype), scale, minimum, dtype)
            acc = tl.dot(low, x_low, acc)
            acc = tl.dot(high, x_high, acc)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    num_groups: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
) -> None:
    """See `Launch` for the grid, in which programs that share weights are neighbours."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for part in range(NUM_PARTS):
        first_group = (tl.program_id(2) * NUM_PARTS + part) * NUM_STEPS * GROUPS_PER_STEP
        total += _sum_of_steps(
            x_ptr, codes_ptr, scale_ptr, zero_ptr, minimum_ptr, n, m, num_rows, num_out, num_in, num_groups,
            first_group, GROUP, GROUPS_PER_STEP, NUM_STEPS, BLOCK_ROWS, BLOCK_OUT,
        )  # fmt: skip
    store_sums(total, bias_ptr, out_ptr, n, m, num_rows, num_out)


def linear_w4a16(x: Tensor, weight: W4, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x · wᵀ + bias.

    x: fp16 or bf16 [rows, num_in], contiguous. Returns [rows, num_out] of `out_dtype` (x's own by default), in `out`
    where one is given. Raises ValueError where shapes or types do not fit.
    """
    check_input(x, weight.num_in, HALF_TYPES)
    out = output_for(x, weight.num_out, out, resolve_dtype(x, out, out_dtype))
    num_groups, groups_per_step = weight.codes.shape[0], STEP // weight.group_size
    tile = tile_for(TILES, x.shape[0])
    launch = plan_launch(tile, triton.cdiv(num_groups, groups_per_step), out, torch.float32)
    _kernel[launch.grid](
        x,
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.minimum,
        weight.bias if launch.partial is None else None,
        out if launch.partial is None else launch.partial,
        x.shape[0],
        weight.num_out,
        weight.num_in,
        num_groups,
        GROUP=weight.group_size,
        GROUPS_PER_STEP=groups_per_step,
        NUM_STEPS=launch.steps,
        NUM_PARTS=launch.parts,
        enable_fp_fusion=False,
        **tile.launch_options,
    )
    return out if launch.partial is None else reduce_partials(launch.partial, out, weight.bias)


def dequantize_w4(weight: W4) -> Tensor:
    """The weights in fp32, [num_out, num_in], computed as the kernel does."""
    groups, num_out = weight.scale.shape
    codes = unpack_halves(weight.codes, weight.num_in).to(torch.float32).reshape(num_out, groups, weight.group_size)
    scale = weight.scale.T[:, :, None].to(torch.float32)
    if weight.minimum is not None:
        grouped = codes * scale + weight.minimum.T[:, :, None].to(torch.float32)
    elif weight.zero_point is not None:
        grouped = (codes - weight.zero_point.T[:, :, None].to(torch.float32)) * scale
    else:
        grouped = (codes - 8.0) * scale
    return grouped.reshape(num_out, weight.num_in)


def linear_w4a16_reference(
    x: Tensor, weight: W4, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The same in torch, with products summed in float64."""
    check_input(x, weight.num_in, HALF_TYPES)
    return linear_16_reference(x, dequantize_w4(weight).to(x.dtype).contiguous(), weight.bias, out, out_dtype)
