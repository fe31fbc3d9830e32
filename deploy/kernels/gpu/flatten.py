"""Activations quantized by a static scale and flattened: a channel that one code cannot hold is spread over several.

docs/numerics.md, *Linear layers with whole-row scales*: copy k of a channel carries what of its code's magnitude lies
between k·qmax and (k + 1)·qmax, so the copies add up to the code (FlattenQuant, arXiv 2402.17985).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.formats.activations import LayerInputs
from deploy.kernels.gpu.operands import OUT_TYPES, check_input, check_static_scale

# Columns of a program, and its warps. Channels do not descend, so what neighbours read lies close together.
BLOCK, NUM_WARPS = 1024, 4
_ROUNDER = tl.constexpr(8388608.0)  # 2^23: adding it to a number from 0 to 2^23 rounds that to an integer, ties to even


@dataclass(frozen=True)
class Copies:
    """Of which channel each column of a flattened weight reads what part, on its device.

    channels: int32 [columns], from 0 to num_channels − 1. offset: fp32 [columns], k·qmax of the column's copy k.
    """

    channels: Tensor
    offset: Tensor
    num_channels: int
    qmax: int


def pack_copies(inputs: LayerInputs, device: torch.device | str) -> Copies:
    """The copies of flattened inputs as the kernel reads them; ValueError where inputs are not flattened."""
    if inputs.flatten is None or inputs.num_channels is None:
        raise ValueError("these inputs are not flattened; use quantize_static or quantize_rows")
    qmax = inputs.grid.qmax
    offset = torch.from_numpy(inputs.copies() * qmax).to(torch.float32)
    return Copies(torch.tensor(inputs.flatten).to(device), offset.to(device), inputs.num_channels, qmax)


@triton.jit
def _flatten_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    channel_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    num_channels: tl.tensor,
    num_columns: tl.tensor,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    channel = tl.load(channel_ptr + column, mask=mask, other=0)
    offset = tl.load(offset_ptr + column, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * num_channels + channel, mask=mask, other=0.0).to(tl.float32)
    scaled = x * tl.div_rn(1.0, tl.load(scale_ptr))
    # Copies of a negative number are those of its magnitude, negated.
    rounded = (tl.minimum(tl.abs(scaled), _ROUNDER) + _ROUNDER) - _ROUNDER
    part = tl.minimum(tl.maximum(rounded - offset, 0.0), QMAX * 1.0)
    codes = tl.where(scaled < 0, -part, part).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * num_columns + column, codes, mask=mask)


def quantize_flattened(
    x: Tensor, scale: Tensor, copies: Copies, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The codes of every column, and `scale`, which serves all rows.

    x: fp16, bf16 or fp32 [rows, channels]. scale: fp32 [1], above 0. Returns integers in `dtype` (int8, or a 16-bit
    type, which holds them exactly) [rows, columns]. Raises ValueError where shapes or types do not fit.
    """
    check_input(x, copies.num_channels, OUT_TYPES)
    check_static_scale(scale)
    rows, num_columns = x.shape[0], copies.channels.shape[0]
    codes = torch.empty((rows, num_columns), dtype=dtype, device=x.device)
    _flatten_kernel[(rows, triton.cdiv(num_columns, BLOCK))](
        x,
        scale,
        copies.channels,
        copies.offset,
        codes,
        copies.num_channels,
        num_columns,
        QMAX=copies.qmax,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return codes, scale


def quantize_flattened_reference(
    x: Tensor, scale: Tensor, copies: Copies, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    check_input(x, copies.num_channels, OUT_TYPES)
    check_static_scale(scale)
    limit, qmax = 2.0**23, copies.qmax
    code = torch.round((x.to(torch.float32) * scale.reciprocal()).clamp(-limit, limit))[:, copies.channels]
    up, down = (code - copies.offset).clamp(0, qmax), (code + copies.offset).clamp(-qmax, 0)
    return (up + down).to(dtype), scale
