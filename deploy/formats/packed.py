"""Grouped 4- and 8-bit weights and their form in a file: compressed-tensors `pack-quantized`.

One form holds symmetric grids, integer zero points and a GGUF's float minima: w = scale·q + minimum per group of
`group_size` input channels, q unsigned. Tensors of a layer NAME with weight [out, in]:

    NAME.weight_packed      I32 [out, in·bits/32]      codes, lowest bits first along the input
    NAME.weight_scale       BF16 | F16 | F32 [out, in/group_size]
    NAME.weight_shape       I64 [2]                    out, in
    NAME.weight_zero_point  I32 [⌈out·bits/32⌉, groups]  asymmetric: zero points, packed along the output
    NAME.weight_min         F16 | F32 [out, groups]    our extension: float minima (a GGUF's own grid)

Layout read from compressed-tensors 0.19 (`compressors/pack_quantized/helpers.py`): the signed value plus 2^(bits−1) is
the unsigned code; 4 and 8 divide 32, so no code straddles two words there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, from_bfloat16, to_bfloat16

ScaleDtype = Literal["BF16", "F16", "F32"]
Bits = Literal[4, 8]
SUPPORTED_BITS = (4, 8)
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_min")


class TensorSource(Protocol):
    """What `decode` reads from: a SafetensorsFile, or several of them."""

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def array(self, name: str) -> npt.NDArray[Any]: ...
    def float32(self, name: str) -> npt.NDArray[np.float32]: ...


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


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Unsigned codes [rows, n] → int32 [rows, ⌈n·bits/32⌉], code 0 in the lowest bits; unused bits are 0."""
    per_word = 32 // bits
    rows, count = codes.shape
    padded = np.zeros((rows, -(-count // per_word) * per_word), dtype=np.uint8)
    padded[:, :count] = codes
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return np.ascontiguousarray(padded).view("<i4")


def unpack_codes(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Inverse of `pack_codes`: int32 [rows, words] → uint8 [rows, count]."""
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if bits == 4:
        nibbles = np.empty((octets.shape[0], octets.shape[1] * 2), dtype=np.uint8)
        nibbles[:, 0::2] = octets & 0x0F
        nibbles[:, 1::2] = octets >> 4
        octets = nibbles
    return np.ascontiguousarray(octets[:, :count])


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


def encode(
    name: str, weight: GroupedInt, scale_dtype: ScaleDtype, *, symmetric: bool = False
) -> dict[str, npt.NDArray[Any] | BFloat16]:
    """The tensors of layer `name` as they go into the file.

    symmetric: leave the zero points out; every one must then be 2^(bits−1). Must equal what the layer's group in
    `quantization_config` says. A weight without zero points is written with `weight_min`, in `scale_dtype`.
    Raises ValueError when a scale or minimum is not exact in `scale_dtype`.
    """
    tensors: dict[str, npt.NDArray[Any] | BFloat16] = {
        f"{name}.weight_packed": pack_codes(weight.q, weight.bits),
        f"{name}.weight_scale": _stored(f"{name}.weight_scale", weight.scale, scale_dtype),
        f"{name}.weight_shape": np.array(weight.shape, dtype=np.int64),
    }
    middle = 1 << (weight.bits - 1)
    if symmetric and (weight.zero_point is None or np.any(weight.zero_point != middle)):
        raise ValueError(f"{name}: symmetric=True needs every zero point to be {middle}; encode it asymmetric")
    if weight.zero_point is None:
        tensors[f"{name}.weight_min"] = _stored(f"{name}.weight_min", weight.minimum, scale_dtype)
    elif not symmetric:
        along_output = pack_codes(np.ascontiguousarray(weight.zero_point.T), weight.bits)
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(along_output.T)
    return tensors


def _require(source: TensorSource, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if name not in source:
        raise FormatError(f"tensor {name!r} is missing")
    if source.shape(name) != shape or source.dtype(name) not in dtypes:
        raise FormatError(
            f"tensor {name!r} is {source.dtype(name)} {list(source.shape(name))}, "
            f"expected {' or '.join(dtypes)} {list(shape)}"
        )


def check_packed(source: TensorSource, name: str, shape: tuple[int, int], group_size: int, bits: int) -> None:
    """Raise FormatError unless layer `name` is stored as documented for a weight of `shape` [out, in].

    Reads the header only, except for the two numbers of `weight_shape`.
    """
    num_out, num_in = shape
    if bits not in SUPPORTED_BITS or group_size <= 0 or num_in % group_size or num_in * bits % 32:
        raise FormatError(f"layer {name!r}: {bits} bits in groups of {group_size} do not fit in_features={num_in}")
    groups = num_in // group_size
    _require(source, f"{name}.weight_packed", (num_out, num_in * bits // 32), ("I32",))
    _require(source, f"{name}.weight_scale", (num_out, groups), ("BF16", "F16", "F32"))
    _require(source, f"{name}.weight_shape", (2,), ("I64",))
    if tuple(int(v) for v in source.array(f"{name}.weight_shape")) != (num_out, num_in):
        raise FormatError(
            f"tensor '{name}.weight_shape' says {list(source.array(f'{name}.weight_shape'))}, expected {list(shape)}"
        )
    has_zero_point, has_min = f"{name}.weight_zero_point" in source, f"{name}.weight_min" in source
    if has_zero_point and has_min:
        raise FormatError(f"layer {name!r} has both weight_zero_point and weight_min; only one may be there")
    if has_zero_point:
        _require(source, f"{name}.weight_zero_point", (-(-num_out * bits // 32), groups), ("I32",))
    if has_min:
        _require(source, f"{name}.weight_min", (num_out, groups), ("F16", "BF16", "F32"))


def decode(source: TensorSource, name: str, group_size: int, bits: int) -> GroupedInt:
    """Read layer `name`; raises FormatError when it is not stored as documented or holds a non-finite scale."""
    if f"{name}.weight_shape" not in source or source.shape(f"{name}.weight_shape") != (2,):
        raise FormatError(f"tensor '{name}.weight_shape' is missing or not of shape [2]")
    num_out, num_in = (int(v) for v in source.array(f"{name}.weight_shape"))
    check_packed(source, name, (num_out, num_in), group_size, bits)
    q = unpack_codes(source.array(f"{name}.weight_packed"), bits, num_in)
    scale = source.float32(f"{name}.weight_scale")
    if f"{name}.weight_min" in source:
        minimum = source.float32(f"{name}.weight_min")
        weight = GroupedInt(q, scale, minimum, bits, group_size)
    elif f"{name}.weight_zero_point" in source:
        packed = np.ascontiguousarray(source.array(f"{name}.weight_zero_point").T)
        zeros = np.ascontiguousarray(unpack_codes(packed, bits, num_out).T)
        weight = GroupedInt.from_zero_point(q, scale, zeros, bits=bits, group_size=group_size)
    else:
        weight = GroupedInt.from_zero_point(q, scale, 1 << (bits - 1), bits=bits, group_size=group_size)
    if not (np.isfinite(weight.scale).all() and np.isfinite(weight.minimum).all()):
        raise FormatError(f"layer {name!r} has a scale or minimum that is not finite")
    return weight
