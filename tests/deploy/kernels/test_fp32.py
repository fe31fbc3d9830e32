import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.kernels.reference.fp32 import EXP_HIGHEST, EXP_LOWEST, exp32, fma, lane_dot, log32, round_half, silu32

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def error_in_ulp(values, reference):
    return np.abs(values.astype(np.float64) - reference) / np.spacing(np.abs(reference).astype(np.float32))


@given(FLOATS, FLOATS, FLOATS)
@settings(max_examples=500, deadline=None)
def test_fma_is_rounded_once_for_any_operands(exact_fma, a, b, c):
    ours = fma(np.float32(a), np.float32(b), np.float32(c))
    assert float(ours) == float(exact_fma(a, b, c))


def test_fma_is_rounded_once_where_rounding_twice_goes_wrong(exact_fma):
    rng = np.random.default_rng(5)
    operands = []
    for _ in range(3000):
        # a·b is a hair less than ±1/2, so that c + a·b is a hair beside the midpoint of two float32 values.
        k, sign = int(rng.integers(1, 200)), 1 - 2 * int(rng.integers(2))
        c = float(rng.integers(1 << 23, 1 << 24))
        a, b = 1 + k * 2.0**-23, sign * 0.5 * (1 - k * 2.0**-23)
        shift = 2.0 ** int(rng.integers(-90, 60))
        operands.append((a, b * shift, c * shift))
    a, b, c = (np.array(column, dtype=np.float32) for column in zip(*operands, strict=True))
    expected = np.array([exact_fma(*row) for row in operands], dtype=np.float32)
    assert np.array_equal(fma(a, b, c), expected)
    twice_differs = np.sum((a.astype(np.float64) * b + c).astype(np.float32) != expected)
    assert twice_differs > 1000  # the inputs do provoke the trap


def test_fma_is_rounded_once_among_subnormals(exact_fma):
    rng = np.random.default_rng(6)
    a = (rng.standard_normal(2000) * 2.0**-70).astype(np.float32)
    b = (rng.standard_normal(2000) * 2.0**-70).astype(np.float32)
    c = (rng.standard_normal(2000) * 2.0**-140).astype(np.float32)
    expected = np.array([exact_fma(*row) for row in zip(a, b, c, strict=True)], dtype=np.float32)
    assert np.array_equal(fma(a, b, c), expected)


def test_fma_treats_infinities_and_nan_as_ieee():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    ours = fma(
        np.array([inf, 1, inf, nan, 3e38], np.float32), np.float32(2), np.array([1, inf, -inf, 1, 1], np.float32)
    )
    assert np.array_equal(ours, np.array([inf, inf, nan, nan, inf], np.float32), equal_nan=True)


def test_exp_is_within_one_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(EXP_LOWEST, EXP_HIGHEST, 300_000), rng.uniform(-1, 1, 100_000)]).astype(np.float32)
    assert error_in_ulp(exp32(x), np.exp(x.astype(np.float64))).max() < 1


def test_exp_at_its_ends():
    x = np.array([-np.inf, -88, EXP_LOWEST, 0, EXP_HIGHEST, 89, np.inf, np.nan], dtype=np.float32)
    y = exp32(x)
    assert y[0] == y[1] == 0
    assert y[2] >= np.finfo(np.float32).smallest_normal  # never subnormal: flushing them changes nothing
    assert y[3] == 1
    assert np.isfinite(y[4])
    assert np.isinf(y[5])
    assert np.isinf(y[6])
    assert np.isnan(y[7])


def test_log_is_within_one_ulp_on_what_sampling_asks_of_it():
    uniform = (np.arange(0, 1 << 23, 11).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    uniform = np.append(uniform, np.float32(1 - 2.0**-24))
    inner = log32(uniform)
    assert error_in_ulp(inner, np.log(uniform.astype(np.float64))).max() < 1
    assert (inner < 0).all()
    assert error_in_ulp(log32(-inner), np.log(-inner.astype(np.float64))).max() < 1


def test_silu_is_close_to_float64():
    x = np.linspace(-120, 120, 10_001, dtype=np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert np.allclose(silu32(x), exact, rtol=5e-7, atol=1e-36)


@pytest.mark.parametrize("count", [16, 48, 96])
def test_the_lane_sum_follows_its_order(exact_fma, count):
    rng = np.random.default_rng(count)
    x, y = rng.standard_normal((2, 3, count)).astype(np.float32)
    for row in range(3):
        lanes = [np.float32(0)] * 16
        for i in range(count):
            lanes[i % 16] = exact_fma(x[row, i], y[row, i], lanes[i % 16])
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[half + i] for i in range(half)]
        assert lane_dot(x, y)[row] == lanes[0]


def test_rounding_to_half_equals_torchs():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(10_000) * 2.0 ** rng.integers(-30, 18, 10_000)).astype(np.float32)
    assert np.array_equal(round_half(x), torch.from_numpy(x).half().numpy())
    assert math.isinf(round_half(np.array([70000.0], np.float32))[0])
