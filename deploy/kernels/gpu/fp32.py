"""exp and log of docs/numerics.md inside Triton kernels: Cephes' polynomials by Horner with fused multiply-add.

With `enable_fp_fusion=False` these are the definition's operations one by one, so a GPU gives the reference's bits.
Sampling uses them, because its tokens must be the reference's; the layers use the hardware's own exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds to integers, ties to even


@triton.jit
def _horner(p: tl.tensor, x: tl.tensor, coefficient: tl.constexpr) -> tl.tensor:
    return tl.fma(p, x, tl.full(x.shape, coefficient, tl.float32))


@triton.jit
def exp32(x: tl.tensor) -> tl.tensor:
    """e^x of a block of fp32 numbers; 0 below −87.3, infinity above 88."""
    inside = tl.minimum(tl.maximum(x, -87.3), 88.0)
    n = (inside * 1.44269504 + _ROUNDER) - _ROUNDER
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), inside)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = tl.full(x.shape, 1.9875691500e-4, tl.float32)
    p = _horner(p, r, 1.3981999507e-3)
    p = _horner(p, r, 8.3334519073e-3)
    p = _horner(p, r, 4.1665795894e-2)
    p = _horner(p, r, 1.6666665459e-1)
    p = _horner(p, r, 5.0000001201e-1)
    p = _horner(p, r, 1.0)
    p = _horner(p, r, 1.0)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, tl.where(x > 88.0, float("inf"), p * power))


@triton.jit
def log32(x: tl.tensor) -> tl.tensor:
    """Natural logarithm of a block of positive normal fp32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [0.5, 1)
    is_low = mantissa < 0.707106781186547524
    e = tl.where(is_low, exponent - 1, exponent).to(tl.float32)
    m = tl.where(is_low, mantissa + mantissa, mantissa) - 1.0
    z = m * m
    p = tl.full(x.shape, 7.0376836292e-2, tl.float32)
    p = _horner(p, m, -1.1514610310e-1)
    p = _horner(p, m, 1.1676998740e-1)
    p = _horner(p, m, -1.2420140846e-1)
    p = _horner(p, m, 1.4249322787e-1)
    p = _horner(p, m, -1.6668057665e-1)
    p = _horner(p, m, 2.0000714765e-1)
    p = _horner(p, m, -2.4999993993e-1)
    p = _horner(p, m, 3.3333331174e-1)
    y = (p * m) * z
    y = tl.fma(e, tl.full(x.shape, -2.12194440e-4, tl.float32), y)
    y = tl.fma(z, tl.full(x.shape, -0.5, tl.float32), y)
    return tl.fma(e, tl.full(x.shape, 0.693359375, tl.float32), m + y)
