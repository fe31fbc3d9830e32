"""Attention of the training-time test (EAGLE-3, arXiv 2503.01840, section 3.1 and figure 6).

At step j a chain that began at token t looks at step 0's keys up to t, and at its own keys of steps 1 … j: what its
cache would hold after drafting j tokens. The first part is one product per conversation over its own tokens, without
padding; the second has one key per step. Each gives a softmax of its own, joined by their normalizers as in
FlashAttention (arXiv 2205.14135, section 3.1).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from train.chains import Chains, Segment
from train.elementwise import accumulator_dtype


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    chains: Chains,
) -> Tensor:
    """queries: [C, heads, d], already divided by √d. keys, values: [T, kv_heads, d], step 0's. own_keys, own_values:
    [C, kv_heads, d] each, of steps 1 … j. Returns [C, heads, d].

    On a CPU in float32 at least: for bfloat16 products oneDNN compiles a kernel for every new shape, and conversations
    have many lengths.
    """
    is_cpu = queries.device.type == "cpu"
    with torch.autocast("cpu", enabled=False) if is_cpu else nullcontext():
        if is_cpu:
            queries, keys, values = (tensor.to(accumulator_dtype(tensor)) for tensor in (queries, keys, values))
            own_keys = [tensor.to(queries.dtype) for tensor in own_keys]
            own_values = [tensor.to(queries.dtype) for tensor in own_values]
        context, normalizer = _attend_context(queries, keys, values, chains)
        if not own_keys:
            return context
        num_chains, num_heads, size = queries.shape
        grouped = (num_chains * keys.shape[1], num_heads // keys.shape[1], size)  # the heads that share keys
        stacked_keys = torch.stack(tuple(own_keys), dim=2).flatten(0, 1)
        stacked_values = torch.stack(tuple(own_values), dim=2).flatten(0, 1)
        scores = torch.bmm(queries.reshape(grouped), stacked_keys.transpose(1, 2))
        joined = torch.cat([normalizer.reshape(*grouped[:2], 1), scores.to(normalizer.dtype)], dim=-1)
        shares = joined.softmax(-1).to(queries.dtype)
        own = torch.bmm(shares[..., 1:], stacked_values)
        return torch.addcmul(own, shares[..., :1], context.reshape(grouped)).view(queries.shape)


def _attend_context(queries: Tensor, keys: Tensor, values: Tensor, chains: Chains) -> tuple[Tensor, Tensor]:
    context: Tensor
    normalizer: Tensor
    context, normalizer = _ContextAttention.apply(queries, keys, values, chains)
    return context, normalizer


class _ContextAttention(torch.autograd.Function):
    """Causal attention of chains over their own conversation, and the logarithm of its normalizer [C, heads]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, chains: Chains) -> Any:
        context = torch.empty_like(queries, memory_format=torch.contiguous_format)
        normalizer = queries.new_empty(queries.shape[:2], dtype=accumulator_dtype(queries))
        shares = []
        for segment in chains.segments:
            scores = torch.bmm(
                _by_kv_head(queries[segment.chains], keys.shape[1]), keys[segment.tokens].permute(1, 2, 0)
            )
            _mask_future(scores, chains.rows, segment)
            share = scores.softmax(-1)
            # The largest score and the largest share are the same token's.
            log_sum = scores.amax(-1, keepdim=True) - share.amax(-1, keepdim=True).log_()
            mixed = torch.bmm(share, values[segment.tokens].transpose(0, 1))
            _by_chain(mixed, context[segment.chains])
            _by_chain(log_sum, normalizer[segment.chains].unsqueeze(-1))
            shares.append(share)
        ctx.chains, ctx.num_shares = chains, len(shares)
        ctx.save_for_backward(queries, keys, values, context, *shares)
        return context, normalizer

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor, grad_normalizer: Tensor) -> Any:
        queries, keys, values, context, *shares = ctx.saved_tensors
        num_kv_heads = keys.shape[1]
        # d(softmax): share · (grad_share − Σ share · grad_share); the normalizer adds its own gradient to every score.
        offset = (torch.linalg.vecdot(grad_context, context) - grad_normalizer).unsqueeze(-1)
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for segment, share in zip(ctx.chains.segments, shares, strict=True):
            grad = _by_kv_head(grad_context[segment.chains], num_kv_heads)
            grad_scores = torch.bmm(grad, values[segment.tokens].permute(1, 2, 0))
            grad_scores.sub_(_by_kv_head(offset[segment.chains], num_kv_heads)).mul_(share)
            _by_chain(torch.bmm(grad_scores, keys[segment.tokens].transpose(0, 1)), grad_queries[segment.chains])
            query = _by_kv_head(queries[segment.chains], num_kv_heads)
            grad_keys[segment.tokens] = torch.bmm(grad_scores.transpose(1, 2), query).transpose(0, 1)
            grad_values[segment.tokens] = torch.bmm(share.transpose(1, 2), grad).transpose(0, 1)
        return grad_queries, grad_keys, grad_values, None


def _by_kv_head(rows: Tensor, num_kv_heads: int) -> Tensor:
    """[c, heads, d] → [kv_heads, group · c, d]: the heads that share keys in one matrix."""
    num_chains, num_heads, size = rows.shape
    grouped = rows.view(num_chains, num_kv_heads, num_heads // num_kv_heads, size)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, size)


def _by_chain(matrices: Tensor, out: Tensor) -> None:
    """The inverse of `_by_kv_head`, into `out`."""
    num_chains, num_heads, size = out.shape
    grouped = matrices.view(len(matrices), num_heads // len(matrices), num_chains, size)
    out.view(num_chains, len(matrices), -1, size).copy_(grouped.permute(2, 0, 1, 3))


def _mask_future(scores: Tensor, rows: Tensor, segment: Segment) -> None:
    """Set scores [kv_heads, group · c, n] of tokens after each chain's first to −∞."""
    tokens = torch.arange(segment.tokens.start, segment.tokens.stop, device=rows.device)
    is_future = tokens > rows[segment.chains, None]
    scores.view(len(scores), -1, *is_future.shape).masked_fill_(is_future, -torch.inf)
