"""A loss over the logits of a whole vocabulary, and its gradient, without ever holding all logits.

The gradient with respect to a row's logits needs nothing that the loss does not, so both come from one pass in which a
slice of logits is computed once, becomes its own gradient in place, and is forgotten (Liger-Kernel's fused linear
cross-entropy, arXiv 2410.10989, section 3.2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.products import fill_rows, product_dtype

Score = Callable[[slice, Tensor], Tensor]
"""score(part, logits): turns the logits [n, D] of rows `part` into the gradient of their unweighted loss, in place, and
returns sums [k] over these rows, the (weighted) loss first."""


def head_loss(
    states: Tensor, lm_head: Tensor, score: Score, *, num_sums: int, rows_per_slice: int, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What `score` sums over all rows of states @ lm_headᵀ; the first is differentiable, for states and lm_head.

    states: [N, H]. lm_head: [D, H]. weight: [N], of each row's loss; by default 1. rows_per_slice: rows of logits held
    at once.
    """
    return tuple(_HeadLoss.apply(states, lm_head, weight, score, num_sums, rows_per_slice))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        lm_head: Tensor,
        weight: Tensor | None,
        score: Score,
        num_sums: int,
        rows_per_slice: int,
    ) -> Any:
        dtype = product_dtype(lm_head)
        matrix = lm_head.to(dtype)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_lm_head = torch.zeros_like(lm_head) if ctx.needs_input_grad[1] else None
        sums = states.new_zeros(num_sums, dtype=torch.promote_types(lm_head.dtype, torch.float32))
        buffer = states.new_empty(0, dtype=dtype)
        for begin in range(0, len(states), rows_per_slice):
            part = slice(begin, begin + rows_per_slice)
            state = fill_rows(states[part], dtype)
            count = len(states[part])
            buffer = buffer if len(buffer) else state.new_empty(len(state), len(lm_head))
            logits = torch.mm(state, matrix.t(), out=buffer[: len(state)])  # behind `count`: of zeros, so zeros
            sums += score(part, logits[:count])
            weights = 1 if weight is None else fill_rows(weight[part, None], dtype)
            if grad_states is not None:
                grad_states[part] = (torch.mm(logits, matrix) * weights)[:count]
            if grad_lm_head is not None:
                _add_product(grad_lm_head, logits.t(), state * weights)
        ctx.save_for_backward(grad_states, grad_lm_head)
        loss, *others = (total.clone() for total in sums)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        grads = [None if grad is None else grad * grad_loss for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
