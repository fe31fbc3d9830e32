"""Grouped 4- and 8-bit weights and their forms in a file: compressed-tensors `pack-quantized` and `int-quantized`.

One form holds symmetric grids, integer zero points and a GGUF's float minima: w = scale·q + minimum per group of
`group_size` input channels, q unsigned; one group as wide as the input is a scale per output channel. Tensors of a
layer NAME with weight [out, in], pack-quantized:

    NAME.weight_packed      I32 [out, in·bits/32]      codes, lowest bits first along the input
    NAME.weight_scale       BF16 | F16 | F32 [out, in/group_size]
    NAME.weight_shape       I64 [2]                    out, in
    NAME.weight_zero_point  I32 [⌈out·bits/32⌉, groups]  asymmetric: zero points, packed along the output
    NAME.weight_min         BF16 | F16 | F32 [out, groups]  our extension: float minima (a GGUF's own grid)

int-quantized, the form of 8-bit weights whose layer also quantizes its inputs (`activations`):

    NAME.weight             I8 [out, in]               codes − 128
    NAME.weight_scale       as above
    NAME.weight_zero_point  I8 [out, groups]           asymmetric: zero points − 128
    NAME.weight_min         as above

Layout read from compressed-tensors 0.19 (`compressors/pack_quantized/helpers.py`, `naive_quantized/base.py`): the
signed value plus 2^(bits−1) is the unsigned code; 4 and 8 divide 32, so no code straddles two words there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import LayerInputs, TensorSource, encode_inputs
from deploy.formats.codes import pack_codes, to_signed, to_unsigned, unpack_codes
from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, from_bfloat16, to_bfloat16

ScaleDtype = Literal["BF16", "F16", "F32"]
Bits = Literal[4, 8]
SUPPORTED_BITS = (4, 8)
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_min")
INT_SUFFIXES = ("weight", "weight_scale", "weight_zero_point", "weight_min")


@dataclass(frozen=True)
class GroupedInt:
    """A weight matrix [out, in] as unsigned codes with one scale and minimum per row and group.

    q: uint8 [out, in], every code < 2^bits. scale, minimum: float32 [out, in/group_size].
    zero_point: uint8 [out, groups], the code of weight 0, or None when the minima are free floats.
    """

    q: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    minimum: npt.NDArray[np.float32]
    bits: int
    group_size: int
    zero_point: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits={self.bits} is not supported; use 4 or 8")
        if self.q.ndim != 2 or self.q.dtype != np.uint8:
            raise ValueError(f"q must be uint8 [out, in], got {self.q.dtype} {self.q.shape}")
        num_out, num_in = self.q.shape
        if self.group_size <= 0 or num_in % self.group_size or num_in * self.bits % 32:
            raise ValueError(f"group_size={self.group_size} does not divide in_features={num_in} into whole words")
        groups = (num_out, num_in // self.group_size)
        for name, array in (("scale", self.scale), ("minimum", self.minimum), ("zero_point", self.zero_point)):
            if array is None:
                continue
            dtype = np.uint8 if name == "zero_point" else np.float32
            if array.shape != groups or array.dtype != dtype:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {groups}, got {array.dtype} {array.shape}")
        for name, codes in (("q", self.q), ("zero_point", self.zero_point)):
            if codes is not None and codes.size and int(codes.max()) >= 1 << self.bits:
                raise ValueError(f"{name} holds {int(codes.max())}, which needs more than bits={self.bits}")

    @classmethod
    def from_zero_point(
        cls,
        q: npt.NDArray[np.uint8],
        scale: npt.NDArray[np.float32],
        zero_point: npt.NDArray[np.uint8] | int,
        *,
        bits: int,
        group_size: int,
    ) -> GroupedInt:
        """The weight (q − zero_point)·scale; `zero_point` [out, groups] or one for all (2^(bits−1): symmetric)."""
        zeros = np.broadcast_to(np.asarray(zero_point, dtype=np.uint8), scale.shape).copy()
        minimum = -(zeros.astype(np.float32) * scale)
        return cls(q, scale, minimum, bits, group_size, zeros)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.q.shape[0]), int(self.q.shape[1])

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weights, float32 [out, in].

        With zero points: float32(q − zero_point)·scale, one rounding, as compressed-tensors computes it for a float32
        scale. Otherwise scale·q rounded to float32, then + minimum rounded to float32, as GGUF readers compute it.
        """
        num_out, num_in = self.q.shape
        grouped = self.q.reshape(num_out, -1, self.group_size).astype(np.float32)
        if self.zero_point is not None:
            grouped -= self.zero_point.astype(np.float32)[:, :, None]
            grouped *= self.scale[:, :, None]
        else:
            grouped *= self.scale[:, :, None]
            grouped += self.minimum[:, :, None]
        return grouped.reshape(num_out, num_in)


def _stored(name: str, values: npt.NDArray[np.float32], dtype: ScaleDtype) -> npt.NDArray[Any] | BFloat16:
    """`values` in the file's dtype, refused when that would change one of them."""
    if dtype == "F32":
        return values
    stored: npt.NDArray[Any] | BFloat16
    if dtype == "BF16":
        bits = to_bfloat16(values)
        stored, back = BFloat16(bits), from_bfloat16(bits)
    elif dtype == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        stored, back = half, half.astype(np.float32)
    else:
        raise ValueError(f"scale_dtype={dtype!r} is not supported; use BF16, F16 or F32")
    if not np.array_equal(back, values):
        raise ValueError(
            f"{name}: values change when stored as {dtype}; round them to {dtype} before choosing the codes, "
            "or use scale_dtype='F32'"
        )
    return stored


def _encode_codes(
    name: str, weight: GroupedInt, *, is_packed: bool, with_zero_points: bool
) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]]
    if is_packed:
        shape = np.array(weight.shape, dtype=np.int64)
        tensors = {f"{name}.weight_packed": pack_codes(weight.q, weight.bits), f"{name}.weight_shape": shape}
    else:
        tensors = {f"{name}.weight": to_signed(weight.q)}
    if with_zero_points:
        assert weight.zero_point is not None
        along_output = pack_codes(np.ascontiguousarray(weight.zero_point.T), weight.bits)
        zeros = np.ascontiguousarray(along_output.T) if is_packed else to_signed(weight.zero_point)
        tensors[f"{name}.weight_zero_point"] = zeros
    return tensors


def encode(
    name: str,
    weight: GroupedInt,
    scale_dtype: ScaleDtype,
    *,
    symmetric: bool = False,
    inputs: LayerInputs | None = None,
) -> dict[str, npt.NDArray[Any] | BFloat16]:
    """The tensors of layer `name` as they go into the file.

    symmetric: leave the zero points out; every one must then be 2^(bits−1). inputs: how its inputs are quantized; with
    8 bits the weight is then int-quantized. Both must equal what the layer's group in `quantization_config` says. A
    weight without zero points is written with `weight_min`, in `scale_dtype`.
    Raises ValueError when a scale or minimum is not exact in `scale_dtype`, or `inputs` are not the weight's.
    """
    middle = 1 << (weight.bits - 1)
    if symmetric and (weight.zero_point is None or np.any(weight.zero_point != middle)):
        raise ValueError(f"{name}: symmetric=True needs every zero point to be {middle}; encode it asymmetric")
    has_minimum = weight.zero_point is None
    tensors: dict[str, npt.NDArray[Any] | BFloat16] = {}
    is_packed = inputs is None or weight.bits != 8
    tensors |= _encode_codes(name, weight, is_packed=is_packed, with_zero_points=not symmetric and not has_minimum)
    tensors[f"{name}.weight_scale"] = _stored(f"{name}.weight_scale", weight.scale, scale_dtype)
    if has_minimum:
        tensors[f"{name}.weight_min"] = _stored(f"{name}.weight_min", weight.minimum, scale_dtype)
    if inputs is not None:
        tensors |= encode_inputs(name, inputs, weight.shape[1])
    return tensors


def _require(source: TensorSource, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if name not in source:
        raise FormatError(f"tensor {name!r} is missing")
    if source.shape(name) != shape or source.dtype(name) not in dtypes:
        raise FormatError(
            f"tensor {name!r} is {source.dtype(name)} {list(source.shape(name))}, "
            f"expected {' or '.join(dtypes)} {list(shape)}"
        )


def _check_packed_codes(source: TensorSource, name: str, shape: tuple[int, int], bits: int) -> None:
    num_out, num_in = shape
    _require(source, f"{name}.weight_packed", (num_out, num_in * bits // 32), ("I32",))
    _require(source, f"{name}.weight_shape", (2,), ("I64",))
    if tuple(int(v) for v in source.array(f"{name}.weight_shape")) != shape:
        raise FormatError(
            f"tensor '{name}.weight_shape' says {list(source.array(f'{name}.weight_shape'))}, expected {list(shape)}"
        )


def check_packed(
    source: TensorSource,
    name: str,
    shape: tuple[int, int],
    group_size: int | None,
    bits: int,
    *,
    is_packed: bool = True,
) -> None:
    """Raise FormatError unless layer `name` is stored as documented for a weight of `shape` [out, in].

    group_size: None for a scale per output channel. is_packed: in the form pack-quantized, otherwise int-quantized.
    Reads the header only, except for the two numbers of `weight_shape`.
    """
    num_out, num_in = shape
    size = num_in if group_size is None else group_size
    if bits not in SUPPORTED_BITS or size <= 0 or num_in % size or num_in * bits % 32:
        raise FormatError(f"layer {name!r}: {bits} bits in groups of {size} do not fit in_features={num_in}")
    groups = num_in // size
    if is_packed:
        _check_packed_codes(source, name, shape, bits)
    else:
        _require(source, f"{name}.weight", shape, ("I8",))
    _require(source, f"{name}.weight_scale", (num_out, groups), ("BF16", "F16", "F32"))
    has_zero_point, has_min = f"{name}.weight_zero_point" in source, f"{name}.weight_min" in source
    if has_zero_point and has_min:
        raise FormatError(f"layer {name!r} has both weight_zero_point and weight_min; only one may be there")
    if has_zero_point and is_packed:
        _require(source, f"{name}.weight_zero_point", (-(-num_out * bits // 32), groups), ("I32",))
    elif has_zero_point:
        _require(source, f"{name}.weight_zero_point", (num_out, groups), ("I8",))
    if has_min:
        _require(source, f"{name}.weight_min", (num_out, groups), ("F16", "BF16", "F32"))


def _shape_of(source: TensorSource, name: str, *, is_packed: bool) -> tuple[int, int]:
    if not is_packed:
        if f"{name}.weight" not in source or len(source.shape(f"{name}.weight")) != 2:
            raise FormatError(f"tensor '{name}.weight' is missing or not a matrix")
        num_out, num_in = source.shape(f"{name}.weight")
        return num_out, num_in
    if f"{name}.weight_shape" not in source or source.shape(f"{name}.weight_shape") != (2,):
        raise FormatError(f"tensor '{name}.weight_shape' is missing or not of shape [2]")
    num_out, num_in = (int(v) for v in source.array(f"{name}.weight_shape"))
    return num_out, num_in


def decode(source: TensorSource, name: str, group_size: int | None, bits: int, *, is_packed: bool = True) -> GroupedInt:
    """Read layer `name`; raises FormatError when it is not stored as documented or holds a non-finite scale.

    Arguments as of `check_packed`.
    """
    num_out, num_in = _shape_of(source, name, is_packed=is_packed)
    check_packed(source, name, (num_out, num_in), group_size, bits, is_packed=is_packed)
    size = num_in if group_size is None else group_size
    if is_packed:
        q = unpack_codes(source.array(f"{name}.weight_packed"), bits, num_in)
    else:
        q = to_unsigned(source.array(f"{name}.weight"))
    scale = source.float32(f"{name}.weight_scale")
    if f"{name}.weight_min" in source:
        weight = GroupedInt(q, scale, source.float32(f"{name}.weight_min"), bits, size)
    elif f"{name}.weight_zero_point" in source:
        stored = source.array(f"{name}.weight_zero_point")
        if is_packed:
            zeros = np.ascontiguousarray(unpack_codes(np.ascontiguousarray(stored.T), bits, num_out).T)
        else:
            zeros = to_unsigned(stored)
        weight = GroupedInt.from_zero_point(q, scale, zeros, bits=bits, group_size=size)
    else:
        weight = GroupedInt.from_zero_point(q, scale, 1 << (bits - 1), bits=bits, group_size=size)
    if not (np.isfinite(weight.scale).all() and np.isfinite(weight.minimum).all()):
        raise FormatError(f"layer {name!r} has a scale or minimum that is not finite")
    return weight
