"""Rows of the embedding, as the start of an fp32 residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements and warps of a program, for every bucket: rows lie anywhere, each is contiguous.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _embedding_kernel(
    tokens_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    x = tl.load(weight_ptr + token * n + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * n + column, x.to(tl.float32), mask=mask)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows `tokens` of `weight`, fp32 [rows, n].

    tokens: int32 or int64 [rows], each below vocab (a padding row's too: 0 will do). weight: [vocab, n].
    """
    rows, n = tokens.shape[0], weight.shape[1]
    out = torch.empty(rows, n, dtype=torch.float32, device=weight.device)
    _embedding_kernel[(rows, triton.cdiv(n, BLOCK))](
        tokens, weight, out, n, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
    )
    return out


def embedding_reference(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight[tokens.to(torch.int64)].to(torch.float32)
