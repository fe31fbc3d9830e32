"""Choosing tokens, and drafters' candidates, from logits: docs/numerics.md, *Sampling* and *Candidates*.

Choosing is finding the largest of z + noise, ties to the lower id: one kernel finds the best few of every block of the
vocabulary, a second the best of those. Greedy rows are the same without noise, and a call may mix both. Only rows that
truncate are sorted. Tokens are the reference's; what scores may differ by is said in docs/numerics.md, *GPU backend*.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.fp32 import exp32, log32
from deploy.kernels.gpu.noise import gumbel_noise
from deploy.kernels.gpu.sampling_rows import MIN_P, NUM_WORDS, TEMPERATURE, SamplingRows
from deploy.kernels.gpu.truncation import penalize, survivors
from deploy.kernels.reference.candidates import candidates as numpy_candidates

# Logits and warps of a program, for every bucket: one row of 49152 is 48 programs, 64 rows of 151936 are 9536. The sum
# of a row's scores goes by these blocks.
BLOCK, NUM_WARPS, MERGE_WARPS = 1024, 4, 4
_NO_COLUMN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _take_best(value: tl.tensor, column: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest value, the lowest of its columns, and the values without it."""
    best = tl.max(value, axis=0)
    best_column = tl.min(tl.where(value == best, column, _NO_COLUMN), axis=0)
    return best, best_column, tl.where(column == best_column, float("-inf"), value)


@triton.jit
def _block_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    last_column_ptr: tl.tensor,
    values_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    vocab: tl.tensor,
    num_blocks: tl.tensor,
    COUNT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    IS_TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Values and columns of a block's COUNT best; `softmax`: the largest value m, Σ exp(value − m), how many logits are
    not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row_ptr = table_ptr + row * NUM_WORDS
    column = block * BLOCK + tl.arange(0, BLOCK)
    is_kept = column < vocab
    logit = tl.load(logits_ptr + row * vocab + column, mask=is_kept, other=0.0)
    num_bad = tl.sum((logit - logit != 0).to(tl.float32), axis=0)
    temperature = tl.load(row_ptr + TEMPERATURE).to(tl.float32, bitcast=True)
    y = tl.div_rn(logit, tl.where(temperature > 0, temperature, 1.0) + tl.zeros([BLOCK], tl.float32))
    if IS_TRUNCATED:
        last = tl.load(last_ptr + row)
        is_kept &= (y > last) | ((y == last) & (column <= tl.load(last_column_ptr + row)))
        is_kept &= exp32(y - tl.load(first_ptr + row)) >= tl.load(row_ptr + MIN_P).to(tl.float32, bitcast=True)
    if temperature > 0:
        tokens = column
        if HAS_IDS:
            tokens = tl.load(token_ids_ptr + column, mask=column < vocab, other=0).to(tl.int32)
        y += gumbel_noise(tokens, row_ptr)
    y = tl.where(is_kept, y, float("-inf"))
    largest = tl.max(y, axis=0)
    shift = tl.where(largest > float("-inf"), largest, 0.0)  # where truncation leaves nothing of this block
    total = tl.sum(exp32(y - shift), axis=0)
    place = row * num_blocks + block
    tl.store(softmax_ptr + place * 3, largest)
    tl.store(softmax_ptr + place * 3 + 1, total)
    tl.store(softmax_ptr + place * 3 + 2, num_bad)
    for rank in range(COUNT):
        best, best_column, y = _take_best(y, column)
        tl.store(values_ptr + place * COUNT + rank, best)
        tl.store(columns_ptr + place * COUNT + rank, best_column)


@triton.jit
def _row_kernel(
    values_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    num_blocks: tl.tensor,
    COUNT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """The COUNT best of a row's blocks, with scores; −1 and −∞ where there are fewer, or a logit is not finite."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    softmax_ptr += (row * num_blocks + block) * 3
    largest_of_block = tl.load(softmax_ptr, mask=block < num_blocks, other=float("-inf"))
    total_of_block = tl.load(softmax_ptr + 1, mask=block < num_blocks, other=0.0)
    num_bad = tl.sum(tl.load(softmax_ptr + 2, mask=block < num_blocks, other=0.0), axis=0)
    largest = tl.max(largest_of_block, axis=0)
    total = tl.sum(total_of_block * exp32(largest_of_block - largest), axis=0)
    log_total = tl.max(log32(total + tl.zeros([BLOCKS], tl.float32)), axis=0)
    entry = tl.arange(0, ENTRIES)
    place = row * num_blocks * COUNT + entry
    value = tl.load(values_ptr + place, mask=entry < num_blocks * COUNT, other=float("-inf"))
    column = tl.load(columns_ptr + place, mask=entry < num_blocks * COUNT, other=_NO_COLUMN)
    for rank in range(COUNT):
        best, token, value = _take_best(value, column)
        is_token = (best > float("-inf")) & (num_bad == 0)
        if HAS_IDS:
            token = tl.load(token_ids_ptr + token, mask=is_token, other=-1).to(tl.int32)
        tl.store(tokens_ptr + row * COUNT + rank, tl.where(is_token, token, -1))
        tl.store(scores_ptr + row * COUNT + rank, tl.where(is_token, (best - largest) - log_total, float("-inf")))


def candidates(
    logits: Tensor,
    rows: SamplingRows,
    count: int,
    path_tokens: Tensor | None = None,
    path_length: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` best tokens of each row, best first, and their scores: int32 and fp32 [rows, count].

    logits: fp32 [rows, vocab]. path_tokens: int32 [rows, longest], tokens of the row's own path, prompt and the row
    itself included, of which the first path_length[row] (int32 [rows]) count; only a repetition penalty needs them.
    token_ids: ascending ids of the logits, None: 0, 1, … The first token is what `sample` chooses. Token −1 and score
    −∞: truncation left no more; −1 in the first place: the row's logits are not all finite. Raises ValueError for a
    repetition penalty without paths.
    """
    num_rows, vocab = logits.shape
    if rows.has_penalty:
        if path_tokens is None or path_length is None:
            raise ValueError("repetition_penalty other than 1 needs the rows' paths: path_tokens and path_length")
        logits = penalize(logits, rows.penalties, path_tokens, path_length, token_ids)
    bounds: tuple[Tensor | None, ...] = (None, None, None)
    if rows.has_truncation:
        bounds = survivors(logits / rows.divisors[:, None], rows)
    num_blocks = triton.cdiv(vocab, BLOCK)
    values = torch.empty(num_rows, num_blocks, count, dtype=torch.float32, device=logits.device)
    columns = torch.empty(num_rows, num_blocks, count, dtype=torch.int32, device=logits.device)
    softmax = torch.empty(num_rows, num_blocks, 3, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, count, dtype=torch.int32, device=logits.device)
    scores = torch.empty(num_rows, count, dtype=torch.float32, device=logits.device)
    has_ids = token_ids is not None
    _block_kernel[(num_rows, num_blocks)](
        logits,
        token_ids,
        rows.table,
        *bounds,
        values,
        columns,
        softmax,
        vocab,
        num_blocks,
        COUNT=count,
        HAS_IDS=has_ids,
        IS_TRUNCATED=rows.has_truncation,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    _row_kernel[(num_rows,)](
        values,
        columns,
        softmax,
        token_ids,
        tokens,
        scores,
        num_blocks,
        COUNT=count,
        HAS_IDS=has_ids,
        BLOCKS=triton.next_power_of_2(num_blocks),
        ENTRIES=triton.next_power_of_2(num_blocks * count),
        num_warps=MERGE_WARPS,
        enable_fp_fusion=False,
    )
    return tokens, scores


def sample(
    logits: Tensor,
    rows: SamplingRows,
    path_tokens: Tensor | None = None,
    path_length: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """The token for each row's position, int32 [rows]; −1 where its logits are not all finite. As of `candidates`."""
    return candidates(logits, rows, 1, path_tokens, path_length, token_ids)[0][:, 0]


def candidates_reference(
    logits: Tensor,
    rows: SamplingRows,
    count: int,
    path_tokens: Tensor | None = None,
    path_length: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A row at a time, by the definition in numpy."""
    tokens = torch.full((len(logits), count), -1, dtype=torch.int32)
    scores = torch.full((len(logits), count), -torch.inf)
    ids = None if token_ids is None else token_ids.cpu().numpy().astype(np.int64)
    for row, values in enumerate(logits.cpu().numpy()):
        if not np.isfinite(values).all():
            continue
        path: list[int] = []
        if path_tokens is not None and path_length is not None:
            path = path_tokens[row, : path_length[row]].tolist()
        found, worth = numpy_candidates(
            values,
            rows.params[row],
            count,
            position=rows.positions[row],
            path=path,
            sample_index=rows.sample_indices[row],
            token_ids=ids,
        )
        tokens[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
        scores[row, : len(found)] = torch.from_numpy(np.array(worth, dtype=np.float32))
    return tokens.to(logits.device), scores.to(logits.device)


def sample_reference(
    logits: Tensor,
    rows: SamplingRows,
    path_tokens: Tensor | None = None,
    path_length: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    return candidates_reference(logits, rows, 1, path_tokens, path_length, token_ids)[0][:, 0]
