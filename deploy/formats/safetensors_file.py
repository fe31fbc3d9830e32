"""Reader and writer of the safetensors format (8-byte length, JSON header, one flat buffer).

Written here rather than taken from the `safetensors` package because numpy has no bfloat16 (that package's numpy side
cannot read it) and because loading tensor by tensor needs the mapped pages of a finished tensor released again.
Format: https://huggingface.co/docs/safetensors, section "Format". Files written here load with that package.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.errors import FormatError
from deploy.formats.unfinished import unfinished

# The most that 4096 packed layers need. Parsed, a hostile header takes twenty times its size in memory; the safetensors
# package's own limit, 100 MB, would let it have gigabytes.
MAX_HEADER_BYTES = 20_000_000

# BF16 has no numpy type: its bits are handled as uint16.
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items() if name != "BF16"}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class BFloat16:
    """An array of bfloat16 values as their bits (uint16), so that the writer can tell it from integers."""

    bits: npt.NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint16:
            raise ValueError(f"BFloat16 holds uint16 bits, got {self.bits.dtype}; convert with to_bfloat16(values)")


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; overflow gives infinity, NaN stays NaN (made quiet).

    values: float32 of any shape. Returns uint16 of that shape.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16).reshape(np.shape(values))


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values (exact) of bfloat16 bits of any shape."""
    wide = np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(np.shape(bits))


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        (name, _count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r}")
    return unique


def _parse_entry(path: Path, name: str, raw: object) -> _Entry:
    def fail(reason: str) -> FormatError:
        return FormatError(f"{path}: tensor {name!r}: {reason}")

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise fail("its header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NUMPY_DTYPES:
        raise fail(f"unsupported dtype {dtype!r}; supported: {', '.join(_NUMPY_DTYPES)}")
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        raise fail(f"shape {shape!r} is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(value) for value in offsets):
        raise fail(f"data_offsets {offsets!r} is not [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * _NUMPY_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise fail(f"data_offsets span {end - begin} bytes, {dtype} {shape} needs {expected}")
    return _Entry(dtype, tuple(shape), begin, end)


def _read_header(path: Path, size: int, prefix: bytes) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the data begins."""
    if len(prefix) < 8:
        raise FormatError(f"{path}: {size} bytes are too few for a safetensors file; it is truncated")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: header of {length} bytes exceeds {MAX_HEADER_BYTES}; not a safetensors file")
    if 8 + length > size:
        raise FormatError(f"{path}: header of {length} bytes reaches past the file's {size}; it is truncated")
    with path.open("rb") as stream:
        stream.seek(8)
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FormatError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return header, 8 + length


def _check_layout(path: Path, entries: dict[str, _Entry], data_bytes: int) -> None:
    """Tensors must tile the data exactly: no overlap, no hole, nothing past the end."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name!r} at byte {entry.begin} {kind} (expected {position})")
        position = entry.end
    if position != data_bytes:
        reason = "it is truncated" if position > data_bytes else "bytes follow the last tensor"
        raise FormatError(f"{path}: tensors need {position} data bytes, the file has {data_bytes}; {reason}")


class SafetensorsFile:
    """A mapped safetensors file: header checked on opening, tensors read when asked for.

    Raises FormatError (a ValueError) naming file and tensor when the file does not have the format, and OSError when
    it cannot be opened. Views returned by `array` stay valid after `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as stream:
            header, self._data_begin = _read_header(self.path, size, stream.read(8))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
                raise FormatError(f"{self.path}: __metadata__ is not a map from text to text")
            self.metadata: dict[str, str] = metadata
            self._entries = {name: _parse_entry(self.path, name, raw) for name, raw in header.items()}
            _check_layout(self.path, self._entries, size - self._data_begin)
            self._map: mmap.mmap | None = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the mapping; the operating system unmaps it when the last view is gone."""
        self._map = None

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise FormatError(f"{self.path}: there is no tensor {name!r}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The format's name of the dtype: "F32", "BF16", "I32", …"""
        return self._entry(name).dtype

    def array(self, name: str) -> npt.NDArray[Any]:
        """Read-only view of the mapped tensor, without a copy; BF16 as its uint16 bits."""
        entry = self._entry(name)
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        count = math.prod(entry.shape)
        dtype = _NUMPY_DTYPES[entry.dtype]
        return np.frombuffer(self._map, dtype, count, self._data_begin + entry.begin).reshape(entry.shape)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as a new float32 array; F32, F16 and BF16 only (all exact)."""
        dtype = self.dtype(name)
        if dtype not in _FLOATS:
            raise FormatError(f"{self.path}: tensor {name!r} is {dtype}, expected one of {', '.join(_FLOATS)}")
        view = self.array(name)
        return from_bfloat16(view) if dtype == "BF16" else view.astype(np.float32)

    def release(self, name: str) -> None:
        """Let the operating system drop this tensor's pages; reading it again maps them again."""
        entry = self._entry(name)
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        first = -(-(self._data_begin + entry.begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self._data_begin + entry.end) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _payload(name: str, value: npt.NDArray[Any] | BFloat16) -> tuple[str, npt.NDArray[Any]]:
    array = value.bits if isinstance(value, BFloat16) else value
    dtype = array.dtype.newbyteorder("<")
    if isinstance(value, BFloat16):
        kind = "BF16"
    elif dtype in _NAMES:
        kind = _NAMES[dtype]
    else:
        raise ValueError(f"tensor {name!r} has dtype {array.dtype}; the format holds {', '.join(_NUMPY_DTYPES)}")
    return kind, np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, npt.NDArray[Any] | BFloat16],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`; the same tensors give the same bytes, and a half-written file never has that name.

    tensors: name → array, or BFloat16(bits). metadata: text only; `{"format": "pt"}` is what transformers expects and
    the default. Raises ValueError for a dtype that the format lacks, OSError when the disk does not take it.
    """
    path = Path(path)
    payloads = {name: _payload(name, value) for name, value in tensors.items()}
    # Widest dtype first keeps every tensor aligned to its own size, as the safetensors package does.
    order = sorted(payloads, key=lambda name: (-payloads[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
    position = 0
    for name in order:
        kind, array = payloads[name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                stream.write(payloads[name][1].reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())  # or, after a power cut, the name may have no contents
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
