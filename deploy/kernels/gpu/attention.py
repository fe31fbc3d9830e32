"""Attention of rows that each follow a path of their own through the cache, for grouped queries.

A row's path is its sequence's cache, then its ancestors in the call, then itself. It is read in blocks of 32 absolute
positions by an online softmax (docs/numerics.md, *Attention*), whether a position lies in the cache or in the call, so
that a row of a tree gives what the same row gives decoded behind its path.

Long paths are cut at fixed absolute positions into parts, each with a maximum, a sum and an output of its own, and
parts are merged in order (Flash-Decoding, with a partition that never varies). A decode call gives each part a program
and merges in a second kernel; a call of many rows has programs enough and merges as it goes, by the same operations.

One program takes one row and the query heads of one key/value head: rows of one sequence read the same keys from the
second-level cache. A tile of several rows would read them once, but only rows with a path in common fill one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.interpreter import round_to

BLOCK = tl.constexpr(32)
_MIN_DOT = 16  # the least that a side of a dot may have


@dataclass(frozen=True)
class Config:
    """part: positions of a part, a multiple of 32. The rest: what a program may use of a multiprocessor."""

    part: int
    num_warps: int
    num_stages: int


# Longest head → configuration, for every bucket: where a part ends and how it is computed must be the same in all, or a
# row's last bits would depend on its bucket. With parts of 512 a context of 8192 is 16 programs a key/value head. Not
# measured: chosen so that no program spills registers (heads of 128 would, with 3 stages, in prefill).
CONFIGS = {64: Config(512, 2, 3), 128: Config(512, 4, 2), 256: Config(512, 8, 2)}
# Calls of more rows (prefill) merge as they go: a workspace of all their parts would be hundreds of megabytes.
MAX_ROWS_SPLIT = 64


@triton.jit
def _path_length(
    ancestors_ptr: tl.tensor, cached: tl.tensor, max_ancestors: tl.tensor, ANCESTORS: tl.constexpr
) -> tl.tensor:
    """Positions of a row's path; 0 for a padding row, which has not even itself."""
    index = tl.arange(0, ANCESTORS)
    ancestors = tl.load(ancestors_ptr + index, mask=index < max_ancestors, other=-1)
    count = tl.sum((ancestors >= 0).to(tl.int32), axis=0)
    return tl.where(count > 0, cached + count, 0)


@triton.jit
def _merge(
    maximum: tl.tensor,
    total: tl.tensor,
    output: tl.tensor,
    part_maximum: tl.tensor,
    part_total: tl.tensor,
    part_output: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The softmax over some parts, and one more. Maxima and sums: [heads]; outputs, not yet divided: [heads, dim]."""
    new_maximum = tl.maximum(maximum, part_maximum)
    correction = tl.exp(maximum - new_maximum)
    factor = tl.exp(part_maximum - new_maximum)
    total = tl.fma(part_total, factor, total * correction)
    output = tl.fma(part_output, tl.broadcast_to(factor[:, None], part_output.shape), output * correction[:, None])
    return new_maximum, total, output


@triton.jit
def _store_quotient(out_ptr: tl.tensor, total: tl.tensor, output: tl.tensor, mask: tl.tensor) -> None:
    """output / total; 0 for a padding row, whose sum is empty."""
    divisor = tl.broadcast_to(tl.where(total > 0, total, 1.0)[:, None], output.shape)
    tl.store(out_ptr, round_to(tl.div_rn(output, divisor), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_kernel(
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    sequence_ptr: tl.tensor,
    cached_ptr: tl.tensor,
    ancestors_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    out_ptr: tl.tensor,
    max_length: tl.tensor,
    max_ancestors: tl.tensor,
    scale: tl.tensor,
    num_parts: tl.tensor,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ANCESTORS: tl.constexpr,
    PART: tl.constexpr,
    IS_SPLIT: tl.constexpr,
) -> None:
    """IS_SPLIT: one part, into `softmax` and `out` [rows, heads, parts, …]; else all, into `out` [rows, heads, …].

    HEADS and DIM: the query heads of a key/value head (REPEAT) and the head's size, rounded up to what a dot takes.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    cached = tl.load(cached_ptr + row)
    ancestors_ptr += row * max_ancestors
    slots_ptr = slot_table_ptr + tl.load(sequence_ptr + row).to(tl.int64) * max_length
    length = _path_length(ancestors_ptr, cached, max_ancestors, ANCESTORS)
    head = (row * KV_HEADS + kv_head) * REPEAT + tl.arange(0, HEADS)
    is_head = tl.arange(0, HEADS) < REPEAT
    dim = tl.arange(0, DIM)
    is_dim = dim[None, :] < HEAD_DIM
    mask = is_head[:, None] & is_dim
    q = tl.load(q_ptr + head[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0).to(tl.float16)
    if IS_SPLIT:
        first = tl.program_id(2) * PART
        last = tl.minimum(first + PART, length)
    else:
        first = 0
        last = length
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, DIM], tl.float32)
    for begin in range(first, last, PART):
        end = tl.minimum(begin + PART, last)
        part_maximum = tl.full([HEADS], float("-inf"), tl.float32)
        part_total = tl.zeros([HEADS], tl.float32)
        part_output = tl.zeros([HEADS, DIM], tl.float32)
        for start in range(begin, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            is_valid = position < end
            is_cached = position < cached
            cached_slot = tl.load(slots_ptr + position, mask=is_valid & is_cached, other=0)
            call_slot = tl.load(ancestors_ptr + (position - cached), mask=is_valid & (position >= cached), other=0)
            slot = tl.where(is_cached, cached_slot, call_slot).to(tl.int64)
            place = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dim[None, :]
            keys = tl.load(k_cache_ptr + place, mask=is_valid[:, None] & is_dim, other=0.0)
            values = tl.load(v_cache_ptr + place, mask=is_valid[:, None] & is_dim, other=0.0)
            scores = tl.where(is_valid[None, :], tl.dot(q, tl.trans(keys)) * scale, float("-inf"))
            new_maximum = tl.maximum(part_maximum, tl.max(scores, axis=1))
            correction = tl.exp(part_maximum - new_maximum)
            weights = tl.exp(scores - new_maximum[:, None])
            part_total = tl.fma(part_total, correction, tl.sum(weights, axis=1))
            part_output = tl.dot(weights.to(tl.float16), values, part_output * correction[:, None])
            part_maximum = new_maximum
        maximum, total, output = _merge(maximum, total, output, part_maximum, part_total, part_output)
    if IS_SPLIT:
        if first < last:
            place = head * num_parts + tl.program_id(2)
            tl.store(softmax_ptr + place * 2, maximum, mask=is_head)
            tl.store(softmax_ptr + place * 2 + 1, total, mask=is_head)
            tl.store(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], output, mask=mask)
    else:
        _store_quotient(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], total, output, mask)


@triton.jit
def _merge_kernel(
    cached_ptr: tl.tensor,
    ancestors_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    part_ptr: tl.tensor,
    out_ptr: tl.tensor,
    max_ancestors: tl.tensor,
    num_parts: tl.tensor,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ANCESTORS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """The parts of a row and the query heads of a key/value head, merged in order and divided."""
    row = tl.program_id(0).to(tl.int64)
    cached = tl.load(cached_ptr + row)
    length = _path_length(ancestors_ptr + row * max_ancestors, cached, max_ancestors, ANCESTORS)
    head = (row * KV_HEADS + tl.program_id(1)) * REPEAT + tl.arange(0, HEADS)
    is_head = tl.arange(0, HEADS) < REPEAT
    dim = tl.arange(0, DIM)
    mask = is_head[:, None] & (dim[None, :] < HEAD_DIM)
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, DIM], tl.float32)
    for part in range(0, tl.cdiv(length, PART)):
        place = head * num_parts + part
        part_maximum = tl.load(softmax_ptr + place * 2, mask=is_head, other=0.0)
        part_total = tl.load(softmax_ptr + place * 2 + 1, mask=is_head, other=0.0)
        part_output = tl.load(part_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        maximum, total, output = _merge(maximum, total, output, part_maximum, part_total, part_output)
    _store_quotient(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], total, output, mask)


def config_for(head_dim: int) -> Config:
    """The entry of CONFIGS for a head size. Raises ValueError for heads larger than the table knows."""
    for longest, config in CONFIGS.items():
        if head_dim <= longest:
            return config
    raise ValueError(f"attention: head_dim={head_dim} is larger than {max(CONFIGS)}; add an entry to CONFIGS")


def _score_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    sequence_of_row: Tensor,
    cached_length: Tensor,
    ancestors: Tensor,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Softmax attention of every row over its path, [rows, heads, head_dim], in `out` or a new tensor of q's type.

    q: [rows, heads, head_dim], multiplied in fp16. k_cache, v_cache: fp16 [num_slots, kv_heads, head_dim]. slot_table:
    int32 [sequences, max_length], the slot of each cached position. sequence_of_row, cached_length: int32 [rows];
    cached positions that belong to the row's path. ancestors: int32 [rows, max_ancestors], slots of the row's ancestors
    within the call in the order of the path, the row itself last, then −1. A row of −1 alone is padding and gives 0.
    config: another than CONFIGS has. Raises ValueError for heads larger than CONFIGS knows.
    """
    rows, heads, head_dim = q.shape
    kv_heads, max_length, max_ancestors = k_cache.shape[1], slot_table.shape[1], ancestors.shape[1]
    config = config or config_for(head_dim)
    if out is None:
        out = torch.empty_like(q)
    num_parts = triton.cdiv(max_length + max_ancestors, config.part)
    is_split = rows <= MAX_ROWS_SPLIT and num_parts > 1
    softmax = part_out = None
    if is_split:
        softmax = torch.empty(rows, heads, num_parts, 2, dtype=torch.float32, device=q.device)
        part_out = torch.empty(rows, heads, num_parts, head_dim, dtype=torch.float32, device=q.device)
    sizes = {
        "KV_HEADS": kv_heads,
        "REPEAT": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "HEADS": max(_MIN_DOT, triton.next_power_of_2(heads // kv_heads)),
        "DIM": max(_MIN_DOT, triton.next_power_of_2(head_dim)),
        "ANCESTORS": triton.next_power_of_2(max_ancestors),
        "PART": config.part,
    }
    _attention_kernel[(rows, kv_heads, num_parts if is_split else 1)](
        q,
        k_cache,
        v_cache,
        slot_table,
        sequence_of_row,
        cached_length,
        ancestors,
        softmax,
        part_out if is_split else out,
        max_length,
        max_ancestors,
        _score_scale(head_dim),
        num_parts,
        **sizes,
        IS_SPLIT=is_split,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    if is_split:
        _merge_kernel[(rows, kv_heads)](
            cached_length,
            ancestors,
            softmax,
            part_out,
            out,
            max_ancestors,
            num_parts,
            **sizes,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return out


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    sequence_of_row: Tensor,
    cached_length: Tensor,
    ancestors: Tensor,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """A row at a time, softmax at once over the whole path; config is of no account."""
    rows, heads, head_dim = q.shape
    repeat = heads // k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    for row in range(rows):
        own = ancestors[row][ancestors[row] >= 0]
        if len(own) == 0:
            out[row] = 0
            continue
        path = torch.cat((slot_table[sequence_of_row[row], : cached_length[row]], own)).to(torch.int64)
        keys, values = (cache[path].to(torch.float32).repeat_interleave(repeat, dim=1) for cache in (k_cache, v_cache))
        scores = (keys * q[row].to(torch.float32)).sum(dim=-1) * _score_scale(head_dim)
        out[row] = (scores.softmax(dim=0)[:, :, None] * values).sum(dim=0)
    return out
