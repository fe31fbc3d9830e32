"""Products with rows of a batch, of sizes that repeat.

On a CPU oneDNN compiles a kernel for every new shape of a bfloat16 product, which takes longer than the product. Two
batches hardly ever have the same number of tokens or chains. So rows are filled up with zeros to a multiple of
ROW_MULTIPLE: a training then has a few dozen shapes, which oneDNN keeps.
"""

from typing import Any

import torch
from torch import Tensor

ROW_MULTIPLE = 64


def product_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast multiplies `tensor` in."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weightᵀ, in autocast's type where that is on; differentiable. rows: [n, K]. weight: [M, K]."""
    dtype = product_dtype(rows)
    if not _is_compiled_by_shape(rows, dtype):
        return torch.nn.functional.linear(rows, weight)
    product: Tensor = _FilledLinear.apply(rows, weight, dtype)
    return product


def fill_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [n, K] in `dtype`, followed by as many zeros as a product of a repeating shape needs: [≥ n, K]."""
    missing = num_missing(len(rows), rows, dtype)
    if missing == 0:
        return rows.to(dtype)
    filled = rows.new_empty(len(rows) + missing, *rows.shape[1:], dtype=dtype)
    filled[: len(rows)] = rows
    filled[len(rows) :] = 0
    return filled


def num_missing(count: int, factor: Tensor, dtype: torch.dtype) -> int:
    """What `count` rows lack to a number that repeats, in products with `factor` in `dtype`; 0 where it is all one."""
    return -count % ROW_MULTIPLE if _is_compiled_by_shape(factor, dtype) else 0


def _is_compiled_by_shape(rows: Tensor, dtype: torch.dtype) -> bool:
    return rows.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


class _FilledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        filled, matrix = fill_rows(rows, dtype), weight.to(dtype)
        ctx.save_for_backward(filled, matrix)
        ctx.dtypes = rows.dtype, weight.dtype
        return torch.mm(filled, matrix.t())[: len(rows)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        filled, matrix = ctx.saved_tensors
        rows_dtype, weight_dtype = ctx.dtypes
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        filled_grad = fill_rows(grad, matrix.dtype)
        grad_rows = torch.mm(filled_grad, matrix)[: len(grad)].to(rows_dtype) if needs_rows else None
        grad_weight = torch.mm(filled_grad.t(), filled).to(weight_dtype) if needs_weight else None
        return grad_rows, grad_weight, None
