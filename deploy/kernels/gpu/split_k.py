"""Splitting a layer's sum over its inputs among programs, with a result that never varies.

One kernel writes the partial sums into a workspace [splits, rows, out], a second adds them in order. Atomic additions
would need no workspace, but add in the order in which programs happen to end.

The partition is a function of the layer's shape alone: not of the rows, so that a row's result does not depend on its
bucket, and not of the device. Prefill keeps it: each of its programs computes all partial sums, one after another, and
adds them in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.interpreter import round_to
from deploy.kernels.gpu.tiles import DECODE_BUCKETS, Tile

# Splitting goes on until there are so many programs (an H100 has 132 multiprocessors), as long as each keeps so many
# steps: a shorter sum costs more to start and to add up than it saves.
TARGET_PROGRAMS = 256
MIN_STEPS = 4
# Outputs of a program in decode buckets, in the tables of all linear kernels.
DECODE_BLOCK_OUT = 64
_REDUCE_BLOCK = 1024


def num_splits(num_out: int, num_steps: int) -> int:
    """Into how many parts the `num_steps` steps over a layer's inputs are divided; a power of two."""
    programs, splits = triton.cdiv(num_out, DECODE_BLOCK_OUT), 1
    while programs * splits < TARGET_PROGRAMS and num_steps >= 2 * splits * MIN_STEPS:
        splits *= 2
    return splits


@dataclass(frozen=True)
class Launch:
    """How a linear kernel is launched: grid of (blocks of rows, blocks of outputs, splits).

    A program adds up `parts` partial sums of `steps` steps each: one where `partial` takes them apart, else all.
    `partial`: [splits, rows, out], to be reduced; None where the kernel finishes by itself.
    """

    grid: tuple[int, int, int]
    parts: int
    steps: int
    partial: Tensor | None


def plan_launch(tile: Tile, num_steps: int, out: Tensor, dtype: torch.dtype) -> Launch:
    """The launch for `out` [rows, num_out] and `num_steps` steps over the inputs, summed in `dtype`."""
    rows, num_out = out.shape
    splits = num_splits(num_out, num_steps)
    # Prefill has programs enough, and its partial sums would be larger than the weights.
    is_partial = splits > 1 and rows <= DECODE_BUCKETS[-1]
    blocks = triton.cdiv(rows, tile.block_rows), triton.cdiv(num_out, tile.block_out)
    return Launch(
        grid=(*blocks, splits if is_partial else 1),
        parts=1 if is_partial else splits,
        steps=triton.cdiv(num_steps, splits),
        partial=torch.empty((splits, rows, num_out), dtype=dtype, device=out.device) if is_partial else None,
    )


@triton.jit
def _reduce_kernel(
    partial_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    row_scale_stride: tl.tensor,
    NUM_SPLITS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < num_out
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(partial_ptr + (split * num_rows + row) * num_out + n, mask=mask, other=0)
    y = total.to(tl.float32)
    if IS_SCALED:
        y = y * tl.load(out_scale_ptr + n, mask=mask, other=0.0) * tl.load(row_scale_ptr + row * row_scale_stride)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * num_out + n, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def reduce_partials(
    partial: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Sum of `partial` over its first axis, in order, into `out` (returned).

    partial: fp32 or int32 [splits, rows, out]. row_scale (fp32 [rows], or [1] for all rows) and out_scale (fp32 [out])
    come together: the sum is multiplied by the latter, then the former. bias: [out], added in fp32. out: [rows, out].
    """
    splits, rows, num_out = partial.shape
    _reduce_kernel[(rows, triton.cdiv(num_out, _REDUCE_BLOCK))](
        partial,
        row_scale,
        out_scale,
        bias,
        out,
        rows,
        num_out,
        row_stride(row_scale),
        NUM_SPLITS=splits,
        IS_SCALED=row_scale is not None,
        HAS_BIAS=bias is not None,
        BLOCK=_REDUCE_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def row_stride(row_scale: Tensor | None) -> int:
    """0 where one scale serves all rows."""
    return 0 if row_scale is None or row_scale.numel() == 1 else 1


def reduce_partials_reference(
    partial: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    total = partial[0].clone()
    for part in partial[1:]:
        total += part
    total = total.to(torch.float32)
    if row_scale is not None and out_scale is not None:
        total = total * out_scale * row_scale[:, None]
    if bias is not None:
        total = total + bias.to(torch.float32)
    return out.copy_(total)
