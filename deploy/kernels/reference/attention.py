"""Attention of docs/numerics.md over rows that each follow a path of their own through the cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deploy.kernels.reference.fp32 import Float32, add_round, exp32, lane_dot

BLOCK = 32
_MAX_PRODUCTS = 1 << 21


def rotate(x: Float32, cosine: Float32, sine: Float32) -> Float32:
    """RoPE in half-split form, products and sums rounded separately (no FMA).

    x: [rows, heads, head_dim]; cosine, sine: [rows, head_dim / 2].
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _scores(q: Float32, keys: npt.NDArray[np.float16], paths: npt.NDArray[np.int64]) -> Float32:
    """q·k / sqrt(head_dim), float32 [rows, kv_heads, q_heads / kv_heads, positions]."""
    rows, kv_heads, repeat, head_dim = q.shape
    scores = np.empty((rows, kv_heads, repeat, paths.shape[1]), dtype=np.float32)
    scale = np.float32(1.0 / np.sqrt(np.float64(head_dim)))
    step = max(1, _MAX_PRODUCTS // (rows * kv_heads * repeat * head_dim))
    for begin in range(0, paths.shape[1], step):
        part = slice(begin, begin + step)
        chosen = keys[paths[:, part]].astype(np.float32).transpose(0, 2, 1, 3)[:, :, None]
        scores[..., part] = lane_dot(q[:, :, :, None, :], chosen) * scale
    return scores


def attend(
    q: Float32,
    keys: npt.NDArray[np.float16],
    values: npt.NDArray[np.float16],
    paths: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> Float32:
    """Softmax attention, online over blocks of 32 absolute positions, positions in order within a block.

    q: [rows, q_heads, head_dim]. keys, values: [slots, kv_heads, head_dim]. paths: slot of each position of a row's
    path [rows, longest]; only the first lengths[row] count. Returns [rows, q_heads · head_dim].
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    # Longest path first: the rows that still have a position then form a prefix.
    order = np.argsort(-lengths, kind="stable")
    paths, lengths = paths[order], lengths[order]
    grouped = q[order].reshape(rows, kv_heads, q_heads // kv_heads, head_dim)
    scores = _scores(grouped, keys, paths)
    positions = np.arange(paths.shape[1])
    scores = np.where(positions < lengths[:, None, None, None], scores, np.float32(-np.inf))
    active = (lengths[:, None] > positions).sum(axis=0)
    maximum = np.full(scores.shape[:3], -np.inf, dtype=np.float32)
    total = np.zeros(scores.shape[:3], dtype=np.float32)
    output = np.zeros(grouped.shape, dtype=np.float64)  # always holds float32 values
    for begin in range(0, paths.shape[1], BLOCK):
        n = int(active[begin])
        block = scores[:n, ..., begin : begin + BLOCK]
        new_maximum = np.maximum(maximum[:n], block.max(axis=-1))
        correction = exp32(maximum[:n] - new_maximum)
        maximum[:n] = new_maximum
        total[:n] *= correction
        output[:n] = (output[:n] * correction[..., None]).astype(np.float32)
        weights = exp32(block - new_maximum[..., None])
        block_values = values[paths[:n, begin : begin + BLOCK]].astype(np.float64)
        for offset in range(block.shape[-1]):
            m = int(active[begin + offset])
            weight = weights[:m, ..., offset]
            total[:m] += weight
            products = weight[..., None].astype(np.float64) * block_values[:m, offset][:, :, None, :]
            output[:m] = add_round(products, output[:m])
    quotient = output.astype(np.float32) / total[..., None]
    result = np.empty_like(quotient)
    result[order] = quotient
    return result.reshape(rows, q_heads * head_dim)
