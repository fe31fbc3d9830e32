"""Exact arithmetic to check float32 arithmetic against: rationals, rounded once."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest


def round_float32(value: Fraction) -> np.float32:
    """The float32 nearest to `value`, ties to even, by integer arithmetic alone."""
    if value == 0:
        return np.float32(0)
    sign, magnitude = (-1, -value) if value < 0 else (1, value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    quotient, rest = divmod(magnitude, unit)
    if rest * 2 > unit or (rest * 2 == unit and quotient % 2):
        quotient += 1
    result = quotient * unit
    if result >= Fraction(2) ** 128:
        return np.float32(sign * np.inf)
    return np.float32(sign * float(result))  # exact: 24 bits fit a double


def _exact_fma(a: float, b: float, c: float) -> np.float32:
    return round_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


@pytest.fixture(scope="session")
def exact_fma() -> Callable[[float, float, float], np.float32]:
    """a·b + c, rounded once."""
    return _exact_fma
