"""float32 arithmetic of docs/numerics.md in numpy: fused multiply-add, exp, log, and the 16-lane sum.

Everything is elementwise and correctly rounded, so a result never depends on the shape of the array around it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

LANES = 16

LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
EXP_LOWEST = np.float32(-87.3)
EXP_HIGHEST = np.float32(88.0)
# Cephes expf and logf (Moshier, netlib.org/cephes/single), highest power first.
EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
LOG_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
SQRT_HALF = np.float32(0.707106781186547524)

_MAGNITUDE = np.int64(0x7FFFFFFFFFFFFFFF)
_TAIL = np.int64(0x1FFFFFFF)  # the float64 significand bits that float32 lacks
_MIDPOINT = np.int64(0x10000000)
_SMALLEST_NORMAL = np.int64(0x3810000000000000)  # 2^-126 as float64 bits


def _round_to_odd(total: Float64, x: Float64, y: Float64) -> Float64:
    """x + y with the float64 rounding of `total` replaced by rounding to odd, so that rounding again is harmless.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums" (2008). The error is Knuth's TwoSum.
    """
    other = total - x
    error = (x - (total - other)) + (y - other)
    bits = total.view(np.int64)
    is_inexact_even = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return (bits + np.where(is_inexact_even, step, np.int64(0))).view(np.float64)


def add_round(product: Float64, addend: Float64) -> Float32:
    """float32(product + addend), rounded once: the second half of a fused multiply-add.

    product: the exact product of two float32 values. addend: a float32 value. Both float64 of one shape.
    Rounding through float64 differs from rounding once only where the float64 sum is halfway between two float32
    values or below their normal range; only those elements take the long way.
    """
    total = np.add(product, addend)
    result = total.astype(np.float32)
    bits = total.view(np.int64)
    is_risky = ((bits & _TAIL) == _MIDPOINT) | ((bits & _MAGNITUDE) < _SMALLEST_NORMAL)
    if is_risky.any():
        chosen = _round_to_odd(total[is_risky], product[is_risky], addend[is_risky])
        result[is_risky] = chosen.astype(np.float32)
    return result


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Float32:
    """a·b + c for float32 operands (broadcast), rounded once, as IEEE fusedMultiplyAdd."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.multiply(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
        product, addend = np.broadcast_arrays(np.atleast_1d(product), np.asarray(c, dtype=np.float64))
        rounded = add_round(np.ascontiguousarray(product), np.ascontiguousarray(addend))
    return rounded if np.ndim(a) or np.ndim(b) or np.ndim(c) else rounded.reshape(())


def fma_chain(products: Float64, start: Float32) -> Float32:
    """start, then one fused multiply-add per entry of the first axis, in order.

    products: float64 [steps, …], exact products of float32 values. start: float32 […].
    """
    total = start.astype(np.float64)
    result = start
    for product in products:
        result = add_round(product, total)
        total = result.astype(np.float64)
    return result


def _halve(lanes: Float32) -> Float32:
    """Sum of the last axis (16 lanes) by adding the upper half to the lower: 8, 4, 2, 1."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def lane_dot(x: Float32, y: Float32) -> Float32:
    """Σ x·y over the last axis (a multiple of 16): element i to lane i mod 16, FMA per lane, lanes halved.

    x, y: broadcastable float32 […, n]. Returns float32 […].
    """
    products = np.multiply(x, y, dtype=np.float64)
    lanes = np.moveaxis(products.reshape(*products.shape[:-1], -1, LANES), -2, 0)
    lanes = np.ascontiguousarray(lanes)
    return _halve(fma_chain(lanes, np.zeros(lanes.shape[1:], dtype=np.float32)))


def exp32(x: Float32) -> Float32:
    """e^x; 0 below −87.3, infinity above 88; elsewhere within 1 ulp (measured in the tests).

    Cody and Waite's reduction by ln 2 in two parts, then a polynomial of degree 7 by Horner with FMA.
    """
    inside = np.clip(x, EXP_LOWEST, EXP_HIGHEST)
    n = np.rint(inside * LOG2_E)
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, inside))
    p = np.full(r.shape, EXP_COEFFICIENTS[0], dtype=np.float32)
    for coefficient in (*EXP_COEFFICIENTS[1:], np.float32(1), np.float32(1)):
        p = fma(p, r, coefficient)
    is_number = ~np.isnan(x)
    power = np.where(is_number, n, np.float32(0)).astype(np.int32)
    scale = ((power + 127) << 23).view(np.float32)
    result = np.where(x < EXP_LOWEST, np.float32(0), p * scale)
    return np.where(x > EXP_HIGHEST, np.float32(np.inf), result).astype(np.float32)


def log32(x: Float32) -> Float32:
    """Natural logarithm of positive normal float32 numbers (nothing else is asked of it)."""
    bits = x.view(np.int32)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)  # in [0.5, 1)
    is_low = mantissa < SQRT_HALF
    e = np.where(is_low, exponent - 1, exponent).astype(np.float32)
    m = np.where(is_low, mantissa + mantissa, mantissa) - np.float32(1)
    z = m * m
    p = np.full(m.shape, LOG_COEFFICIENTS[0], dtype=np.float32)
    for coefficient in LOG_COEFFICIENTS[1:]:
        p = fma(p, m, coefficient)
    y = (p * m) * z
    y = fma(e, LN2_LOW, y)
    y = fma(np.float32(-0.5), z, y)
    return fma(e, LN2_HIGH, m + y)


def silu32(x: Float32) -> Float32:
    """x / (1 + e^(−x))."""
    return x / (np.float32(1) + exp32(-x))


def round_half(x: Float32) -> npt.NDArray[np.float16]:
    """float16, ties to even; beyond 65504 (after rounding) infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)
