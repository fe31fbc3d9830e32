"""What comes before the noise in docs/numerics.md, *Sampling*: the repetition penalty, top-k and top-p.

Survivors are a prefix of the order (value descending, id ascending), so the last of them says which they are. min-p is
left to the kernel that chooses, which compares every weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.fp32 import exp32
from deploy.kernels.gpu.sampling_rows import NUM_WORDS, TOP_K, TOP_P, SamplingRows

# Sorted logits and warps of a program, one a row: prefix sums go from block to block, in this order for all calls.
BLOCK, NUM_WARPS = 2048, 8


def penalize(
    logits: Tensor, penalties: Tensor, path_tokens: Tensor, path_length: Tensor, token_ids: Tensor | None = None
) -> Tensor:
    """Logits with those of tokens on the row's path divided, or multiplied where they are not positive.

    logits: fp32 [rows, vocab]. penalties: fp32 [rows]. path_tokens: int32 [rows, longest], the row's own tokens, of
    which the first path_length[row] count. token_ids: ascending ids of the logits, None: 0, 1, …
    """
    vocab = logits.shape[1]
    tokens = path_tokens.to(torch.int64)
    is_seen = torch.arange(tokens.shape[1], device=tokens.device) < path_length[:, None]
    if token_ids is not None:
        ids = token_ids.to(torch.int64)
        columns = torch.searchsorted(ids, tokens).clamp_(max=vocab - 1)
        is_seen &= ids[columns] == tokens
        tokens = columns
    seen = torch.zeros(logits.shape[0], vocab + 1, dtype=torch.bool, device=logits.device)
    seen.scatter_(1, torch.where(is_seen, tokens, vocab), True)
    factor = penalties[:, None]
    return torch.where(seen[:, :vocab], torch.where(logits > 0, logits / factor, logits * factor), logits)


@triton.jit
def _last_kernel(
    values_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    last_column_ptr: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * vocab
    row_ptr = table_ptr + row * NUM_WORDS
    top_k = tl.load(row_ptr + TOP_K)
    count = tl.where(top_k > 0, tl.minimum(top_k, vocab), vocab)
    top_p = tl.load((row_ptr + TOP_P).to(tl.pointer_type(tl.float64)))
    first = tl.load(values_ptr)
    if top_p < 1:
        # Totals have a block of one element: a scan is of blocks.
        total = tl.zeros([1], tl.float64)
        for begin in range(0, count, BLOCK):
            rank = begin + tl.arange(0, BLOCK)
            value = tl.load(values_ptr + rank, mask=rank < count, other=float("-inf"))
            total += tl.sum(exp32(value - first).to(tl.float64), axis=0)
        threshold = top_p * total
        running = tl.zeros([1], tl.float64)
        num_below = 0
        for begin in range(0, count, BLOCK):
            rank = begin + tl.arange(0, BLOCK)
            value = tl.load(values_ptr + rank, mask=rank < count, other=float("-inf"))
            weight = exp32(value - first).to(tl.float64)
            is_below = (running + tl.cumsum(weight, axis=0) < threshold) & (rank < count)
            num_below += tl.sum(is_below.to(tl.int32), axis=0)
            running += tl.sum(weight, axis=0)
        count = tl.minimum(num_below + 1, count)
    tl.store(first_ptr + row, first)
    tl.store(last_ptr + row, tl.load(values_ptr + count - 1))
    tl.store(last_column_ptr + row, tl.load(columns_ptr + row * vocab + count - 1).to(tl.int32))


def survivors(z: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each row, and the last that top-k and top-p leave: fp32, fp32 and int32 (column) [rows].

    z: logits after penalty and temperature, fp32 [rows, vocab].
    """
    num_rows, vocab = z.shape
    values, columns = torch.sort(z, dim=1, descending=True, stable=True)
    first, last = torch.empty(2, num_rows, dtype=torch.float32, device=z.device)
    last_column = torch.empty(num_rows, dtype=torch.int32, device=z.device)
    _last_kernel[(num_rows,)](
        values,
        columns,
        rows.table,
        first,
        last,
        last_column,
        vocab,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return first, last, last_column
