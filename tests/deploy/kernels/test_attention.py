import math

import numpy as np
import pytest

from deploy.kernels.reference.attention import attend
from deploy.kernels.reference.fp32 import exp32


def scalar_exp(x):
    return exp32(np.array([x], dtype=np.float32))[0]


def slow_attention(exact_fma, q, keys, values):
    """docs/numerics.md for one row and head: q [d], keys and values [positions, d]."""
    dim = len(q)
    scores = []
    for key in keys.astype(np.float32):
        lanes = [np.float32(0)] * 16
        for i in range(dim):
            lanes[i % 16] = exact_fma(q[i], key[i], lanes[i % 16])
        while len(lanes) > 1:
            lanes = [lanes[i] + lanes[len(lanes) // 2 + i] for i in range(len(lanes) // 2)]
        scores.append(lanes[0] * np.float32(1 / math.sqrt(dim)))
    maximum, total, output = np.float32(-np.inf), np.float32(0), [np.float32(0)] * dim
    for begin in range(0, len(scores), 32):
        block = scores[begin : begin + 32]
        new_maximum = max(maximum, *block) if len(block) > 1 else max(maximum, block[0])
        correction = scalar_exp(maximum - new_maximum)
        maximum = new_maximum
        total = total * correction
        output = [o * correction for o in output]
        for score, value in zip(block, values[begin : begin + 32].astype(np.float32), strict=True):
            weight = scalar_exp(score - maximum)
            total = total + weight
            output = [exact_fma(weight, v, o) for v, o in zip(value, output, strict=True)]
    return np.array([o / total for o in output], dtype=np.float32)


@pytest.mark.parametrize(("length", "head_dim"), [(1, 16), (31, 16), (33, 32), (70, 16)])
def test_it_equals_the_slow_loop_bit_for_bit(exact_fma, length, head_dim):
    rng = np.random.default_rng(length)
    q = (rng.standard_normal((1, 2, head_dim)) * 3).astype(np.float32)
    keys, values = rng.standard_normal((2, length, 1, head_dim)).astype(np.float16)
    ours = attend(q, keys, values, np.arange(length)[None], np.array([length]))
    for head in range(2):
        expected = slow_attention(exact_fma, q[0, head], keys[:, 0], values[:, 0])
        assert np.array_equal(ours[0, head * head_dim : (head + 1) * head_dim], expected)


def test_it_is_near_softmax_in_float64():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 4, 16)).astype(np.float32)
    keys, values = rng.standard_normal((2, 80, 2, 16)).astype(np.float16)
    lengths = np.array([80, 1, 45])
    paths = np.stack([rng.permutation(80) for _ in range(3)])
    ours = attend(q, keys, values, paths, lengths).reshape(3, 4, 16)
    for row in range(3):
        for head in range(4):
            chosen = paths[row, : lengths[row]]
            k, v = keys[chosen, head // 2].astype(np.float64), values[chosen, head // 2].astype(np.float64)
            weights = np.exp(k @ q[row, head].astype(np.float64) / 4)
            assert np.allclose(ours[row, head], weights @ v / weights.sum(), atol=2e-6)
