"""Elementwise parts of a decoder layer as single autograd nodes.

Eager autograd saves and passes over several copies of the activations for each of these; written by hand, a training
step spends less of its time outside matrix products (benchmarks/eagle_step.py). Every function is checked against
torch's own operations and by finite differences.
"""

from typing import Any

import torch
from torch import Tensor


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What sums over `x` are kept in: its own type, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


class _RmsNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulator_dtype(x))
        scale = (norm.square().div_(x.shape[-1]).add_(eps)).rsqrt_()
        normalized = (x * scale).to(x.dtype)
        ctx.save_for_backward(normalized, scale)
        return normalized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normalized, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, normalized).unsqueeze(-1).div_(grad.shape[-1])
        return torch.addcmul(grad, normalized, along, value=-1).mul_(scale.to(grad.dtype)), None


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) over the last dimension; a norm's weight is multiplied elsewhere. Any shape [..., H]."""
    normalized: Tensor = _RmsNormalize.apply(x, eps)
    return normalized


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; gate_up: [..., 2I], the gate first. Returns [..., I]."""
    activated: Tensor = _SwiGlu.apply(gate_up)
    return activated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        return _rotated(grad, cosine, sine, -1), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine, value=-direction)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine, value=direction)
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions in half-split form. x: [rows, heads, d]; cosine, sine: [rows, 1, d / 2] in x's dtype."""
    rotated: Tensor = _Rotate.apply(x, cosine, sine)
    return rotated
