"""Linear layers whose file says how inputs are quantized: one scale a row. docs/numerics.md, "Linear layers with
whole-row scales"; the flattening is FlattenQuant's (arXiv 2402.17985)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import MAX_COLUMNS, LayerInputs
from deploy.formats.packed import GroupedInt
from deploy.kernels.reference.fp32 import Float32, Float64, add_round
from deploy.kernels.reference.linear import GROUP, SMALLEST_ABSMAX

# Beyond what any copy of a channel can carry; keeps codes within integers that float32 holds.
CODE_LIMIT = np.float32(2.0**23)
_PIECE = 512  # inputs summed in float32 at once, exactly: 512·255·127 < 2^24
_BLOCK_OUT = 1024  # outputs per block, so that temporaries stay small; no effect on results


def round_to_grid(x: Float32, scale: float) -> npt.NDArray[np.int32]:
    """c of docs/numerics.md: the codes of x under a static scale before they are clamped, ties to even."""
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore"):
        return np.rint(np.clip(x * inverse, -CODE_LIMIT, CODE_LIMIT)).astype(np.int32)


def spread_copies(codes: npt.NDArray[np.int32], inputs: LayerInputs) -> npt.NDArray[np.int8]:
    """Unclamped codes [rows, C] to those of every copy, int8 [rows, C'].

    The copies of a channel add up to its code as long as that is at most (number of copies)·qmax.
    """
    qmax = inputs.grid.qmax
    if inputs.flatten is None:
        return np.clip(codes, -qmax, qmax).astype(np.int8)
    offset = inputs.copies() * qmax
    copied = codes[:, inputs.flatten]
    return (np.clip(copied - offset, 0, qmax) + np.clip(copied + offset, -qmax, 0)).astype(np.int8)


def quantize_rows(x: Float32, inputs: LayerInputs) -> tuple[npt.NDArray[np.int8], Float32]:
    """Codes int8 [rows, columns of the weight] and scales float32 [rows] of x [rows, channels].

    Scope "token": absmax/qmax of the row, ties to even; a row whose absmax is below 2^-100 gets scale 0 and codes 0.
    """
    if inputs.scale is not None:
        codes = spread_copies(round_to_grid(x, inputs.scale), inputs)
        return codes, np.full(x.shape[0], inputs.scale, dtype=np.float32)
    qmax = np.float32(inputs.grid.qmax)
    absmax = np.abs(x).max(axis=1)
    is_zero = absmax < SMALLEST_ABSMAX
    divisor = np.where(is_zero, np.float32(1), absmax)
    inverse = np.where(is_zero, np.float32(0), qmax / divisor)
    scale = np.where(is_zero, np.float32(0), absmax / qmax)
    return np.rint(x * inverse[:, None]).astype(np.int8), scale


@dataclass(frozen=True)
class _Block:
    """Some outputs of a layer. codes: q − z, int16 [groups, group, out]; scale, minimum: float64 [groups, out]."""

    codes: npt.NDArray[np.int16]
    scale: Float64
    minimum: Float64 | None


def _make_blocks(weight: GroupedInt) -> list[_Block]:
    num_out = weight.shape[0]
    codes = weight.q.reshape(num_out, -1, weight.group_size).astype(np.int16)
    if weight.zero_point is not None:
        codes -= weight.zero_point.astype(np.int16)[:, :, None]
    blocks = []
    for begin in range(0, num_out, _BLOCK_OUT):
        part = slice(begin, begin + _BLOCK_OUT)
        minimum = None if weight.zero_point is not None else weight.minimum[part].T.astype(np.float64)
        by_group = np.ascontiguousarray(codes[part].transpose(1, 2, 0))
        blocks.append(_Block(by_group, weight.scale[part].T.astype(np.float64), minimum))
    return blocks


def _dots(inputs: Float32, codes: npt.NDArray[np.int16]) -> Float64:
    """Exact integers [rows, out]; inputs: [rows, group], codes: [group, out]."""
    total = np.zeros((inputs.shape[0], codes.shape[1]))
    for begin in range(0, inputs.shape[1], _PIECE):
        part = slice(begin, begin + _PIECE)
        # Integers below 2^24 in float32: every order of summation is exact.
        total += np.ascontiguousarray(inputs[:, part]) @ codes[part].astype(np.float32)
    return total


def _accumulate(block: _Block, inputs: Float32, totals: Float64) -> Float32:
    """Rows of one block, not yet multiplied by their scales. inputs: [groups, rows, group]; totals: [groups, rows]."""
    acc = np.zeros((inputs.shape[1], block.scale.shape[1]))
    for group in range(inputs.shape[0]):
        dots = _dots(inputs[group], block.codes[group]).astype(np.float32).astype(np.float64)
        acc = add_round(dots * block.scale[group], acc).astype(np.float64)
        if block.minimum is not None:
            acc = add_round(totals[group][:, None] * block.minimum[group], acc).astype(np.float64)
    return acc.astype(np.float32)


class RowScaledLinear:
    """y = W·x with x quantized as its file says, and W integers in groups or with a scale per output."""

    def __init__(self, weight: GroupedInt, inputs: LayerInputs, bias: Float32 | None = None) -> None:
        """Raises ValueError when the weight's groups are not multiples of 32, or it has too many columns."""
        num_columns, size = weight.shape[1], weight.group_size
        if num_columns % GROUP or (size != num_columns and size % GROUP):
            raise ValueError(f"group_size={size} of {num_columns} columns; use 32, 64, 128 or a scale per output")
        if num_columns > MAX_COLUMNS:
            raise ValueError(f"the weight has {num_columns} columns; at most {MAX_COLUMNS} can be summed in 32 bits")
        self.inputs, self._bias, self._group_size = inputs, bias, size
        self._blocks = _make_blocks(weight)

    def __call__(self, x: Float32) -> Float32:
        codes, scale = quantize_rows(x, self.inputs)
        grouped = codes.reshape(x.shape[0], -1, self._group_size).transpose(1, 0, 2)
        totals = grouped.sum(axis=2, dtype=np.int64).astype(np.float64)
        values = np.ascontiguousarray(grouped).astype(np.float32)
        y = np.concatenate([_accumulate(block, values, totals) for block in self._blocks], axis=1) * scale[:, None]
        return y if self._bias is None else y + self._bias
