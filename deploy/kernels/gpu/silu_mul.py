"""The product of an MLP's two branches: silu(gate) · up, computed in fp32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.interpreter import round_to

# Elements and warps of a program, for every bucket: a thread loads 8 neighbouring elements, 16 bytes, of either half.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _silu_mul_kernel(gate_up_ptr: tl.tensor, out_ptr: tl.tensor, inter: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inter
    gate_ptr = gate_up_ptr + row * 2 * inter + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inter, mask=mask, other=0.0).to(tl.float32)
    y = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inter + column, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up, [rows, inter], in `out` or a new tensor of the same type as `gate_up`.

    gate_up: [rows, 2 · inter], 16 bits or fp32, the gate's half first.
    """
    rows, inter = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(rows, inter)
    _silu_mul_kernel[(rows, triton.cdiv(inter, BLOCK))](
        gate_up, out, inter, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
    )
    return out


def silu_mul_reference(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    gate, up = gate_up.to(torch.float32).chunk(2, dim=1)
    y = gate / (1.0 + torch.exp(-gate)) * up
    return y.to(gate_up.dtype) if out is None else out.copy_(y)
