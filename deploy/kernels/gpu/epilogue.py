"""How a linear kernel ends: what is stored of its sums; and what integer products share, from checks to launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu.interpreter import round_to
from deploy.kernels.gpu.operands import check_input, output_for
from deploy.kernels.gpu.split_k import plan_launch, reduce_partials, row_stride
from deploy.kernels.gpu.tiles import Tile, tile_for

# |weight| <= 128, |activation| <= 127: longer sums could leave 32 bits.
MAX_INPUTS = (2**31 - 1) // (128 * 127)


@triton.jit
def store_sums(
    total: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
) -> None:
    """Write fp32 sums [outputs n, rows m], plus bias, rounded to the type of what they are written to."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    rows = tl.program_id(2) * num_rows + m
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * num_out + n[:, None]
    mask = (n < num_out)[:, None] & (m < num_rows)[None, :]
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_scaled(
    acc: tl.tensor,
    row_scale_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    row_scale_stride: tl.tensor,
    IS_PARTIAL: tl.constexpr,
) -> None:
    """Write int32 sums [outputs n, rows m]: as they are where partial, else times both scales, plus bias."""
    if IS_PARTIAL:
        rows = tl.program_id(2) * num_rows + m
        out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * num_out + n[:, None]
        tl.store(out_ptrs, acc, mask=(n < num_out)[:, None] & (m < num_rows)[None, :])
    else:
        row_scale = tl.load(row_scale_ptr + m * row_scale_stride, mask=m < num_rows, other=0.0)
        out_scale = tl.load(out_scale_ptr + n, mask=n < num_out, other=0.0)
        y = acc.to(tl.float32) * out_scale[:, None] * row_scale[None, :]
        store_sums(y, bias_ptr, out_ptr, n, m, num_rows, num_out)


class ScaledWeight(Protocol):
    """Integers in a kernel's own layout, with one fp32 scale per output."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def num_out(self) -> int: ...
    @property
    def num_in(self) -> int: ...


def launch_scaled(
    kernel: Any,
    tiles: Mapping[int, Tile],
    step: int,
    codes: Tensor,
    scale: Tensor,
    weight: ScaledWeight,
    out: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The product of int8 `codes` [rows, in] and a weight by its `kernel`, which takes `step` inputs at a time."""
    check_activations(codes, scale, weight.num_in)
    out = output_for(codes, weight.num_out, out, out_dtype)
    tile = tile_for(tiles, codes.shape[0])
    launch = plan_launch(tile, triton.cdiv(weight.num_in, step), out, torch.int32)
    kernel[launch.grid](
        codes,
        weight.codes,
        scale,
        weight.scale,
        weight.bias,
        out if launch.partial is None else launch.partial,
        codes.shape[0],
        weight.num_out,
        weight.num_in,
        row_stride(scale),
        STEP=step,
        NUM_STEPS=launch.steps * launch.parts,
        IS_PARTIAL=launch.partial is not None,
        enable_fp_fusion=False,
        **tile.launch_options,
    )
    return out if launch.partial is None else reduce_partials(launch.partial, out, weight.bias, scale, weight.scale)


def check_activations(codes: Tensor, scale: Tensor, num_in: int) -> None:
    """Raise ValueError unless codes are int8 [rows, num_in] with fp32 scales [rows], or [1] for all rows."""
    check_input(codes, num_in, (torch.int8,))
    if scale.dtype != torch.float32 or scale.dim() != 1 or scale.shape[0] not in (1, codes.shape[0]):
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}; {codes.shape[0]} rows need float32 [{codes.shape[0]}], "
            "or [1] for all of them"
        )


def check_per_output(weight: GroupedInt, bits: int) -> None:
    """Raise ValueError unless `weight` has `bits` bits, one symmetric scale per output, and few enough inputs."""
    num_in, middle = weight.shape[1], 1 << (bits - 1)
    is_symmetric = weight.zero_point is not None and bool((weight.zero_point == middle).all())
    if weight.bits != bits or weight.group_size != num_in or not is_symmetric:
        raise ValueError(
            f"a weight of {weight.bits} bits in {'symmetric' if is_symmetric else 'asymmetric'} groups of "
            f"{weight.group_size} does not fit integer activations, which need {bits} bits and one symmetric scale "
            f"per output (group_size={num_in}); use linear_w4a16, or dequantize it for linear_16"
        )
    if num_in > MAX_INPUTS:
        raise ValueError(f"in_features={num_in} could overflow 32-bit sums; integer products take {MAX_INPUTS} at most")


def scaled_reference(
    codes: Tensor,
    scale: Tensor,
    integers: Tensor,
    weight: ScaledWeight,
    out: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same in torch: codes · integersᵀ ([out, in], those of the weight) in float64, where it is exact."""
    check_activations(codes, scale, weight.num_in)
    out = output_for(codes, weight.num_out, out, out_dtype)
    sums = (codes.to(torch.float64) @ integers.to(torch.float64).T).to(torch.int32)
    y = sums.to(torch.float32) * weight.scale * scale[:, None]
    if weight.bias is not None:
        y += weight.bias.to(torch.float32)
    return out.copy_(y)
