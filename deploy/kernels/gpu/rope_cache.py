"""From the output of the q, k and v projections to rotated queries and to keys and values in their cache slots.

One program takes one head of one row: RMSNorm over the head where the architecture has it, RoPE in half-split form,
and the rounding to what is stored. Products and sums are rounded separately, as docs/numerics.md says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deploy.kernels.gpu.interpreter import round_to
from deploy.kernels.gpu.rms_norm import inverse_rms, rms_norm_reference

# For every bucket and head size: a head is so small that one warp holds it, and its sums need no barrier.
NUM_WARPS = 1


@triton.jit
def _rope_cache_kernel(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    mask = dim < HALF
    x_ptr = qkv_ptr + (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + dim
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    cache_offset = slot * KV_HEADS * (2 * HALF) + dim
    if head >= HEADS + KV_HEADS:
        value_ptr = v_cache_ptr + cache_offset + (head - HEADS - KV_HEADS) * (2 * HALF)
        # A mask of whole blocks: the interpreter knows no other.
        is_written = mask & (dim * 0 + slot >= 0)
        tl.store(value_ptr, first.to(tl.float16), mask=is_written)
        tl.store(value_ptr + HALF, second.to(tl.float16), mask=is_written)
        return
    is_query = head < HEADS
    if HAS_NORM:
        weight_ptr = q_norm_ptr if is_query else k_norm_ptr
        factor = inverse_rms(tl.sum(first * first + second * second, axis=0), 2 * HALF, eps)
        first = (first * factor) * tl.load(weight_ptr + dim, mask=mask, other=0.0)
        second = (second * factor) * tl.load(weight_ptr + HALF + dim, mask=mask, other=0.0)
    angle = tl.load(positions_ptr + row).to(tl.int64) * HALF + dim
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if is_query:
        query_ptr = q_out_ptr + (row * HEADS + head) * (2 * HALF) + dim
        tl.store(query_ptr, round_to(rotated_first, q_out_ptr.dtype.element_ty), mask=mask)
        tl.store(query_ptr + HALF, round_to(rotated_second, q_out_ptr.dtype.element_ty), mask=mask)
    else:
        key_ptr = k_cache_ptr + cache_offset + (head - HEADS) * (2 * HALF)
        is_written = mask & (dim * 0 + slot >= 0)
        tl.store(key_ptr, rotated_first.to(tl.float16), mask=is_written)
        tl.store(key_ptr + HALF, rotated_second.to(tl.float16), mask=is_written)


def rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Fill `q_out` with rotated queries, and slot slots[row] of the caches with the row's key and value.

    qkv: [rows, (heads + 2 · kv_heads) · head_dim], 16 bits or fp32; all of q, then k, then v. cos, sin: fp32 [context,
    head_dim / 2]. positions: int32 [rows], below context (a padding row's too: 0 will do). slots: int32 [rows]; −1, a
    padding row: nothing is written to the caches. q_out: [rows, heads, head_dim], any float type; float16 is what
    `attention` multiplies. k_cache, v_cache: fp16 [num_slots, kv_heads, head_dim]. q_norm, k_norm: fp32 [head_dim],
    both or neither: RMSNorm over each head of q and k, with `eps`, before the rotation.
    """
    rows, heads, head_dim = q_out.shape
    kv_heads, half = k_cache.shape[1], head_dim // 2
    _rope_cache_kernel[(rows, heads + 2 * kv_heads)](
        qkv,
        cos,
        sin,
        positions,
        slots,
        q_out,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        HAS_NORM=q_norm is not None,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    rows, heads, head_dim = q_out.shape
    kv_heads = k_cache.shape[1]
    x = qkv.to(torch.float32).reshape(rows, -1, head_dim)
    q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q = rms_norm_reference(q, q_norm, eps, torch.float32)
        k = rms_norm_reference(k, k_norm, eps, torch.float32)
    at = positions.to(torch.int64)
    q_out.copy_(_rotate(q, cos[at], sin[at]))
    is_real = slots >= 0
    kept = slots[is_real].to(torch.int64)
    k_cache[kept] = _rotate(k, cos[at], sin[at])[is_real].to(torch.float16)
    v_cache[kept] = v[is_real].to(torch.float16)
