"""How a quantized linear layer's inputs are quantized, where its file says so, and the tensors that say it.

A layer without any of this has its inputs quantized by the runtime alone: int8 in groups of 32. Tensors of a layer NAME
whose weight has C' columns:

    NAME.input_scale    F32 [1]    scope "tensor": the scale of every input
    NAME.input_flatten  I32 [C']   our extension: the channel that column i multiplies a copy of

Flattening is FlattenQuant's (arXiv 2402.17985): a large channel is carried by several columns. docs/numerics.md has the
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from deploy.formats.errors import FormatError

Scope = Literal["tensor", "token"]
SUPPORTED_BITS = (4, 8)
INPUT_SUFFIXES = ("input_scale", "input_flatten")
# The columns of a flattened weight come in whole groups.
COLUMN_MULTIPLE = 32
# A sum of products over so many inputs still fits 32 bits: 65536·255·127 < 2^31.
MAX_COLUMNS = 65536


class TensorSource(Protocol):
    """What is read from: a SafetensorsFile, or several of them."""

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def array(self, name: str) -> npt.NDArray[Any]: ...
    def float32(self, name: str) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class ActivationGrid:
    """A symmetric grid of −qmax … qmax. scope: one scale for a layer's inputs, or one for each row of them."""

    bits: int
    scope: Scope

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"activation bits={self.bits} is not supported; use 4 or 8")
        if self.scope not in ("tensor", "token"):
            raise ValueError(f"activation scope={self.scope!r} is not supported; use tensor or token")

    @property
    def qmax(self) -> int:
        """7 or 127."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of one layer.

    scale: of scope "tensor", exact in fp32; None for scope "token", whose scales come with the rows. flatten: int32
    [C'], non-decreasing from 0 without a gap: column i of the weight multiplies copy k of channel flatten[i], k the
    number of earlier columns of that channel. None: a column for each channel.
    """

    grid: ActivationGrid
    scale: float | None = None
    flatten: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if (self.scale is not None) != (self.grid.scope == "tensor"):
            raise ValueError(
                f"scope {self.grid.scope!r} and input scale {self.scale} do not fit; only 'tensor' has one"
            )
        if self.scale is not None and (not is_scale(self.scale) or float(np.float32(self.scale)) != self.scale):
            raise ValueError(f"input scale {self.scale} is not a positive, normal float32 with a finite reciprocal")
        if self.flatten is None:
            return
        if self.scale is None:
            raise ValueError("flattened inputs need scope 'tensor': copies are cut at a known threshold")
        if self.flatten.ndim != 1 or self.flatten.dtype != np.int32 or self.flatten.size % COLUMN_MULTIPLE:
            raise ValueError(
                f"flatten must be int32 [a multiple of {COLUMN_MULTIPLE}], "
                f"got {self.flatten.dtype} {list(self.flatten.shape)}"
            )
        steps = np.diff(self.flatten.astype(np.int64), prepend=-1)
        if not self.flatten.size or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise ValueError("flatten must begin with channel 0 and go up by 0 or 1: every channel in order, copied")

    @property
    def num_channels(self) -> int | None:
        """Channels of a row before flattening; None where there is no flattening."""
        return None if self.flatten is None else int(self.flatten[-1]) + 1

    def copies(self) -> npt.NDArray[np.int32]:
        """k of every column, int32 [C']: 0 for the first of a channel. Raises ValueError without flattening."""
        if self.flatten is None:
            raise ValueError("these inputs are not flattened")
        first = np.searchsorted(self.flatten, self.flatten, side="left")
        return (np.arange(self.flatten.size) - first).astype(np.int32)

    def equals(self, other: LayerInputs) -> bool:
        """Whether a row gives the same codes under both."""
        if (self.grid, self.scale) != (other.grid, other.scale):
            return False
        if self.flatten is None or other.flatten is None:
            return self.flatten is other.flatten
        return np.array_equal(self.flatten, other.flatten)


def is_scale(value: float) -> bool:
    """Whether one can divide by `value`: positive, neither it nor its reciprocal beyond fp32's normal numbers."""
    return 2.0**-126 <= value <= 2.0**126  # also false for NaN


def encode_inputs(name: str, inputs: LayerInputs, num_columns: int) -> dict[str, npt.NDArray[Any]]:
    """The tensors of layer `name`; num_columns: of its weight. Raises ValueError where they do not fit together."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    if inputs.scale is not None:
        tensors[f"{name}.input_scale"] = np.array([inputs.scale], dtype=np.float32)
    if inputs.flatten is not None:
        if inputs.flatten.size != num_columns:
            raise ValueError(f"{name}: flatten has {inputs.flatten.size} columns, the weight {num_columns}")
        tensors[f"{name}.input_flatten"] = inputs.flatten
    return tensors


def _array(source: TensorSource, name: str, dtype: str, dimensions: str) -> npt.NDArray[Any]:
    if name not in source:
        raise FormatError(f"tensor {name!r} is missing")
    if source.dtype(name) != dtype or len(source.shape(name)) != 1:
        raise FormatError(f"tensor {name!r} is {source.dtype(name)} {list(source.shape(name))}, expected {dimensions}")
    return source.array(name)


def decode_inputs(
    source: TensorSource, name: str, grid: ActivationGrid, num_channels: int, *, is_flattened: bool
) -> LayerInputs:
    """Read layer `name`, whose rows have `num_channels` inputs; raises FormatError naming what is not as documented."""
    scale, flatten = None, None
    if grid.scope == "tensor":
        values = _array(source, f"{name}.input_scale", "F32", "F32 [1]")
        if values.shape != (1,) or not is_scale(float(values[0])):
            raise FormatError(
                f"tensor '{name}.input_scale' is {values.tolist()[:2]}, expected one positive number, "
                "normal in float32 as its reciprocal"
            )
        scale = float(values[0])
    if is_flattened:
        flatten = np.array(_array(source, f"{name}.input_flatten", "I32", "I32 [columns]"), dtype=np.int32)
    try:
        inputs = LayerInputs(grid, scale, flatten)
    except ValueError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    if inputs.num_channels not in (None, num_channels):
        raise FormatError(
            f"tensor '{name}.input_flatten' names {inputs.num_channels} channels, expected {num_channels}"
        )
    return inputs
