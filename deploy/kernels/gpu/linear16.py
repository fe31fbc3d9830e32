"""Linear layer of 16-bit weights and activations: lm_head, EAGLE heads, layers that are not quantized.

docs/numerics.md, `bf16`: products are exact and summed in fp32, in an order that depends on the layer's shape alone
(cuBLAS chooses its order by the number of rows). Bias is added in fp32, before the result is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.epilogue import store_sums
from deploy.kernels.gpu.interpreter import operand
from deploy.kernels.gpu.operands import HALF_TYPES, check_bias, check_input, output_for, resolve_dtype
from deploy.kernels.gpu.split_k import plan_launch, reduce_partials
from deploy.kernels.gpu.tiles import DECODE_BUCKETS, PREFILL, Tile, tile_for

# Inputs of one step, the same in all buckets: 128 bytes of a weight row, a whole cache line. A step of 64 outputs is
# 8 KB, and splits are as long as those of 4-bit weights in bytes. Reasoned, not yet measured.
STEP = 64
TILES = {bucket: Tile(16, 64, 4, 4) for bucket in DECODE_BUCKETS if bucket <= 16} | {
    32: Tile(32, 64, 4, 4),
    64: Tile(64, 64, 4, 4),
    PREFILL: Tile(128, 128, 8, 3),
}


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    STEP: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
) -> None:
    """See `Launch` for the grid, in which programs that share weights are neighbours."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = tl.arange(0, STEP)
    # A vocabulary of 128k times 8k inputs is half of what 32 bits count.
    weight_row = n.to(tl.int64)[:, None] * num_in
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for part in range(NUM_PARTS):
        first = (tl.program_id(2) * NUM_PARTS + part) * NUM_STEPS * STEP
        acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        for step in range(NUM_STEPS):
            i = first + step * STEP + k
            is_weight = (n < num_out)[:, None] & (i < num_in)[None, :]
            is_x = (i < num_in)[:, None] & (m < num_rows)[None, :]
            w = tl.load(weight_ptr + weight_row + i[None, :], mask=is_weight, other=0.0)
            x = tl.load(x_ptr + m[None, :] * num_in + i[:, None], mask=is_x, other=0.0)
            acc = tl.dot(operand(w), operand(x), acc)
        total += acc
    store_sums(total, bias_ptr, out_ptr, n, m, num_rows, num_out)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}; linear_16 takes a contiguous [out, in] matrix of x's own "
            f"{x.dtype}"
        )


def linear_16(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x · weightᵀ + bias.

    x: fp16 or bf16 [rows, in]. weight: [out, in] of the same type. bias: [out]. All contiguous. Returns [rows, out] of
    `out_dtype` (x's own by default), in `out` where one is given. Raises ValueError where shapes or types do not fit.
    """
    _check_weight(x, weight)
    num_out, num_in = weight.shape
    check_input(x, num_in, HALF_TYPES)
    check_bias(bias, num_out)
    out = output_for(x, num_out, out, resolve_dtype(x, out, out_dtype))
    tile = tile_for(TILES, x.shape[0])
    launch = plan_launch(tile, triton.cdiv(num_in, STEP), out, torch.float32)
    _kernel[launch.grid](
        x,
        weight,
        bias if launch.partial is None else None,
        out if launch.partial is None else launch.partial,
        x.shape[0],
        num_out,
        num_in,
        STEP=STEP,
        NUM_STEPS=launch.steps,
        NUM_PARTS=launch.parts,
        enable_fp_fusion=False,
        **tile.launch_options,
    )
    return out if launch.partial is None else reduce_partials(launch.partial, out, bias)


def linear_16_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in torch, with products summed in float64."""
    _check_weight(x, weight)
    check_input(x, weight.shape[1], HALF_TYPES)
    check_bias(bias, weight.shape[0])
    out = output_for(x, weight.shape[0], out, resolve_dtype(x, out, out_dtype))
    y = x.to(torch.float64) @ weight.to(torch.float64).T
    if bias is not None:
        y += bias.to(torch.float64)
    return out.copy_(y.to(torch.float32))
