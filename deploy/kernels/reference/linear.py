"""Linear layers of docs/numerics.md: int8 activations in groups of 32, and 16-bit activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16
from deploy.kernels.reference.fp32 import Float32, Float64, add_round

GROUP = 32
Codes = npt.NDArray[np.integer[Any]]  # uint8 or int8
SMALLEST_ABSMAX = np.float32(2.0**-100)
_BLOCK_OUT = 2048  # outputs per block, so that a block's temporaries stay in cache; no effect on results
_BLOCK_ELEMENTS = 1 << 21


class Linear(Protocol):
    """x [rows, in] → y [rows, out], float32."""

    def __call__(self, x: Float32) -> Float32: ...


def quantize_groups(x: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Codes int8 [rows, n] and scales float32 [rows, n/32]: absmax/127 per group of 32, ties to even.

    A group whose absmax is below 2^-100 gets scale 0 and codes 0. Raises ValueError when 32 does not divide n.
    """
    rows, count = x.shape
    if count % GROUP:
        raise ValueError(f"in_features={count} is not a multiple of {GROUP}; int8 activations need that")
    grouped = x.reshape(rows, count // GROUP, GROUP)
    absmax = np.abs(grouped).max(axis=2)
    is_zero = absmax < SMALLEST_ABSMAX
    divisor = np.where(is_zero, np.float32(1), absmax)
    inverse = np.where(is_zero, np.float32(0), np.float32(127) / divisor)
    scale = np.where(is_zero, np.float32(0), absmax / np.float32(127))
    codes = np.rint(grouped * inverse[:, :, None]).astype(np.int8)
    return codes.reshape(rows, count), scale


def quantize_weights4(weight: Float32) -> GroupedInt:
    """A plain layer [out, in] in 4 bits per group of 32 along the input, from its least to its largest weight.

    Scales and minima are rounded to fp16 first. Raises ValueError when 32 does not divide `in`.
    """
    rows, count = weight.shape
    if count % GROUP:
        raise ValueError(f"in_features={count} is not a multiple of {GROUP}; 4-bit weights need that")
    grouped = weight.reshape(rows, count // GROUP, GROUP)
    least, most = grouped.min(axis=2), grouped.max(axis=2)
    scale = ((most - least) / np.float32(15)).astype(np.float16).astype(np.float32)
    minimum = least.astype(np.float16).astype(np.float32)
    divisor = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint((grouped - minimum[:, :, None]) / divisor[:, :, None]), 0, 15)
    q = np.where(scale[:, :, None] == 0, 0, codes).astype(np.uint8).reshape(rows, count)
    return GroupedInt(q, scale, minimum, bits=4, group_size=GROUP)


@dataclass(frozen=True)
class _Block:
    """Some outputs of a layer. codes: [K/32, 32, out]; scale, minimum: float64 [K/32, out] holding float32 values."""

    codes: Codes
    scale: Float64
    minimum: Float64 | None


def _make_blocks(codes: Codes, scale: Float32, minimum: Float32 | None, group_size: int) -> list[_Block]:
    num_out, num_in = codes.shape
    repeat = group_size // GROUP
    blocks = []
    for begin in range(0, num_out, _BLOCK_OUT):
        part = slice(begin, begin + _BLOCK_OUT)
        by_group = codes[part].reshape(-1, num_in // GROUP, GROUP).transpose(1, 2, 0)
        scales = np.repeat(scale[part].T.astype(np.float64), repeat, axis=0)
        minima = None if minimum is None else np.repeat(minimum[part].T.astype(np.float64), repeat, axis=0)
        blocks.append(_Block(np.ascontiguousarray(by_group), scales, minima))
    return blocks


def _accumulate(block: _Block, codes: Float32, scale: Float32, offset: Float32) -> Float32:
    """Rows of one block. codes: [K/32, rows, 32] as float32; scale, offset: [K/32, rows, 1]."""
    # Integers below 2^24 in float32: every order of summation is exact.
    dots = np.matmul(codes, block.codes.astype(np.float32))
    scaled = (dots * scale).astype(np.float64)
    acc = np.zeros(dots.shape[1:], dtype=np.float64)
    for group in range(dots.shape[0]):
        acc = add_round(scaled[group] * block.scale[group], acc).astype(np.float64)
        if block.minimum is not None:
            acc = add_round(offset[group].astype(np.float64) * block.minimum[group], acc).astype(np.float64)
    return acc.astype(np.float32)


class Int8Linear:
    """y = W·x with x quantized to int8 in groups of 32 and W grouped integers, accumulated as docs/numerics.md says."""

    def __init__(self, blocks: list[_Block], bias: Float32 | None) -> None:
        self._blocks, self._bias = blocks, bias
        self._num_groups = blocks[0].codes.shape[0]

    @classmethod
    def from_grouped(cls, weight: GroupedInt, bias: Float32 | None = None) -> Int8Linear:
        """A packed layer. Raises ValueError when its groups are not multiples of 32."""
        if weight.group_size % GROUP:
            raise ValueError(f"group_size={weight.group_size} is not a multiple of {GROUP}; use 32, 64 or 128")
        return cls(_make_blocks(weight.q, weight.scale, weight.minimum, weight.group_size), bias)

    @classmethod
    def from_float(cls, weight: Float32, bias: Float32 | None = None) -> Int8Linear:
        """A plain layer [out, in], quantized here: int8 per group of 32 along the input, symmetric, no minimum."""
        codes, scale = quantize_groups(weight)
        return cls(_make_blocks(codes, scale, None, GROUP), bias)

    @classmethod
    def from_float4(cls, weight: Float32, bias: Float32 | None = None) -> Int8Linear:
        """The same in 4 bits with minima (`quantize_weights4`)."""
        return cls.from_grouped(quantize_weights4(weight), bias)

    def __call__(self, x: Float32) -> Float32:
        codes, scale = quantize_groups(x)
        rows = x.shape[0]
        grouped = codes.reshape(rows, self._num_groups, GROUP).transpose(1, 0, 2)
        totals = grouped.sum(axis=2, dtype=np.int32).astype(np.float32)
        scales = np.ascontiguousarray(scale.T)
        offsets = (scales * totals)[:, :, None]
        values = np.ascontiguousarray(grouped).astype(np.float32)
        step = max(1, _BLOCK_ELEMENTS // (self._num_groups * _BLOCK_OUT))
        parts = []
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            outs = [
                _accumulate(block, values[:, part], scales[:, part, None], offsets[:, part]) for block in self._blocks
            ]
            parts.append(np.concatenate(outs, axis=1))
        y = np.concatenate(parts)
        return y if self._bias is None else y + self._bias


class FloatLinear:
    """y = W·x in float32, summed in the BLAS library's order; row by row, so that rows do not influence each other.

    is_rounded: inputs and weights are rounded to bfloat16 first (products are then exact in float32). Without it
    nothing is rounded, which serves to compare with other implementations.
    """

    def __init__(self, weight: Float32, bias: Float32 | None, *, is_rounded: bool) -> None:
        self._bits = to_bfloat16(weight) if is_rounded else None
        self._weight = None if is_rounded else weight
        self._bias = bias

    def __call__(self, x: Float32) -> Float32:
        if self._bits is not None:
            weight, inputs = from_bfloat16(self._bits), from_bfloat16(to_bfloat16(x))
        else:
            assert self._weight is not None
            weight, inputs = self._weight, x
        y = np.empty((x.shape[0], weight.shape[0]), dtype=np.float32)
        for index in range(x.shape[0]):
            y[index] = weight @ np.ascontiguousarray(inputs[index])
        return y if self._bias is None else y + self._bias
