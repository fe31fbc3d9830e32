"""Loads the native library and wraps what it offers in a few small classes. numpy and ctypes only.

Environment variables:
    UNDERSTUDY_ISA          the instruction set to use instead of the best one that this machine has; results are the
                            same bits with every one of them
    UNDERSTUDY_THREADS      how many threads to compute with (deploy/kernels/cpu/threads.py)
    UNDERSTUDY_CPU_LIBRARY  a library file to load instead of the one beside this file, such as a sanitized build
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from array import array
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import LayerInputs
from deploy.kernels.cpu.threads import choose_threads

ISA_VARIABLE = "UNDERSTUDY_ISA"
LIBRARY_VARIABLE = "UNDERSTUDY_CPU_LIBRARY"
ISAS = ("amx", "avx512vnni", "avxvnni", "avx2", "scalar")  # best first
_LIBRARY = "libunderstudy_cpu.so"
_OUT_OF_MEMORY = "out of memory"  # as abi.cpp says it
_ABI_VERSION = 6
PHASES = ("other", "quantize", "qkv", "attention", "output", "mlp", "head", "sampling")
_NUMBER_TYPES = {"F32": 0, "F16": 1, "BF16": 2}

_logger = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]


class Weights(Structure):
    """`us_weights` of the header."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("minimum", c_void_p),
        ("bias", c_void_p),
        ("row_ids", c_void_p),
        ("bits", c_int32),
        ("group_size", c_int32),
        ("scale_type", c_int32),
        ("is_plain", c_int32),
        ("has_float_minimum", c_int32),
        ("is_bytes", c_int32),
        ("input_bits", c_int32),
        ("input_scale", c_float),
        ("flatten", c_void_p),
    )


class Shape(Structure):
    """`us_shape` of the header."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("has_qk_norm", c_int32),
        ("rms_norm_eps", c_float),
        ("num_features", c_int32),
        ("norm_before_residual", c_int32),
    )


class Sampling(Structure):
    """`us_sampling` of the header."""

    _fields_ = (
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition_penalty", c_double),
        ("top_k", c_int64),
        ("seed", c_uint64),
        ("sample_index", c_uint64),
    )


class Call(Structure):
    """`us_call` of the header."""

    _fields_ = (
        ("num_rows", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("parents", c_void_p),
        ("sequences", c_void_p),
        ("num_taps", c_int64),
        ("tap_layers", c_void_p),
        ("taps", c_void_p),
        ("num_head_rows", c_int64),
        ("head_rows", c_void_p),
        ("logits", c_void_p),
        ("sampling", c_void_p),
        ("chosen", c_void_p),
        ("continues", c_int32),
        ("features", c_void_p),
        ("num_candidates", c_int32),
        ("candidates", c_void_p),
        ("scores", c_void_p),
    )


class DraftCall(Structure):
    """`us_draft` of the header."""

    _fields_ = (
        ("sequence", c_int64),
        ("num_tokens", c_int64),
        ("tokens", c_void_p),
        ("features", c_void_p),
        ("sampling", c_void_p),
        ("depth", c_int32),
        ("width", c_int32),
        ("num_nodes", c_int32),
        ("min_probability", c_double),
        ("min_gain", c_double),
        ("drafted", c_void_p),
        ("parents", c_void_p),
        ("scores", c_void_p),
    )


_W, _HANDLE = POINTER(Weights), c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "us_abi_version": (c_int, ()),
    "us_error": (c_char_p, ()),
    "us_isa_is_supported": (c_int, (c_char_p,)),
    "us_runtime_create": (_HANDLE, (c_char_p, c_int32)),
    "us_runtime_destroy": (None, (_HANDLE,)),
    "us_matrix_create": (_HANDLE, (_HANDLE, _W)),
    "us_matrix_destroy": (None, (_HANDLE,)),
    "us_matrix_bytes": (c_int64, (_HANDLE,)),
    "us_matrix_multiply": (c_int, (_HANDLE, c_void_p, c_int64, c_void_p, c_int64)),
    "us_exp": (c_int, (_HANDLE, c_void_p, c_int64, c_void_p)),
    "us_to_half": (c_int, (_HANDLE, c_void_p, c_int64, c_void_p)),
    "us_sample": (
        c_int64,
        (_HANDLE, c_void_p, c_int64, POINTER(Sampling), c_void_p, c_int64, c_int64, c_void_p),
    ),
    "us_candidates": (
        c_int64,
        (
            _HANDLE,
            c_void_p,
            c_int64,
            POINTER(Sampling),
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_int32,
            c_void_p,
            c_void_p,
        ),
    ),
    "us_measure_read": (c_double, (_HANDLE, c_int64, c_int64)),
    "us_measure_dot": (c_double, (_HANDLE, c_int64)),
    "us_model_create": (_HANDLE, (_HANDLE, POINTER(Shape))),
    "us_model_destroy": (None, (_HANDLE,)),
    "us_model_set_linear": (c_int, (_HANDLE, c_int32, c_int32, _W)),
    "us_model_set_norm": (c_int, (_HANDLE, c_int32, c_int32, c_void_p, c_int64)),
    "us_model_set_head": (c_int, (_HANDLE, _W, c_void_p)),
    "us_model_set_embedding_int8": (c_int, (_HANDLE, _W)),
    "us_model_set_embedding": (c_int, (_HANDLE, c_void_p, c_int32)),
    "us_model_share_embedding": (c_int, (_HANDLE, _HANDLE)),
    "us_model_finish": (c_int, (_HANDLE,)),
    "us_model_add_rope": (c_int, (_HANDLE, c_void_p, c_void_p, c_int64)),
    "us_model_weight_bytes": (c_int64, (_HANDLE,)),
    "us_model_cache_bytes": (c_int64, (_HANDLE,)),
    "us_model_forward": (c_int, (_HANDLE, POINTER(Call))),
    "us_model_draft": (c_int64, (_HANDLE, POINTER(DraftCall))),
    "us_model_keep": (c_int, (_HANDLE, c_int64, c_void_p, c_int64)),
    "us_model_truncate": (c_int, (_HANDLE, c_int64, c_int64)),
    "us_model_time_phases": (c_int, (_HANDLE, c_int32)),
    "us_model_phase_times": (None, (_HANDLE, c_void_p)),
    "us_model_length": (c_int64, (_HANDLE, c_int64)),
    "us_model_reset": (None, (_HANDLE, c_int64)),
}


def library_path() -> Path:
    """The file that UNDERSTUDY_CPU_LIBRARY names, or where the build puts the library: beside this file."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else Path(__file__).parent / _LIBRARY


def load_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its signatures declared. Raises OSError, saying what to do, when it is not usable."""
    remedy = "install the package again (`make install` or `pip install -e .`)"
    if not path.exists():
        named = f", which {LIBRARY_VARIABLE} names" if os.environ.get(LIBRARY_VARIABLE) else f"; {remedy}"
        raise FileNotFoundError(f"{path}: the native library is missing{named}")
    library = ctypes.CDLL(str(path.resolve()))
    if getattr(library, "us_abi_version", lambda: None)() != _ABI_VERSION:
        raise OSError(f"{path}: the native library was built from another version of the source; {remedy}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def native() -> ctypes.CDLL:
    """The library at `library_path()`, loaded once. Raises OSError, saying what to do, when it is not usable."""
    return load_library(library_path())


def pointer(array: npt.NDArray[Any] | None) -> int | None:
    """Address of a C-contiguous array's data, or None. The caller keeps the array alive."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def address(numbers: array[Any]) -> int:
    """Where the items of a non-empty array lie. The caller keeps it alive, and as long as it is.

    Of a few numbers an `array` is made and its place known in a quarter of the time that numpy takes.
    """
    return numbers.buffer_info()[0]


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, best first."""
    return tuple(isa for isa in ISAS if native().us_isa_is_supported(isa.encode()))


def choose_isa() -> str:
    """The instruction set that UNDERSTUDY_ISA names, or the best one. Raises ValueError naming the choices."""
    available = supported_isas()
    named = os.environ.get(ISA_VARIABLE)
    if not named:
        return available[0]
    if named not in ISAS:
        raise ValueError(f"{ISA_VARIABLE}={named!r} is unknown; use {', '.join(ISAS)}")
    if named not in available:
        raise ValueError(f"{ISA_VARIABLE}={named!r} is not supported by this machine; use {', '.join(available)}")
    return named


def describe_choice(threads: int | None = None) -> str:
    """What computes here: "avx512vnni, 2 threads; also: avx2, scalar". Raises as `choose_isa`, `choose_threads`."""
    isa, count = choose_isa(), choose_threads(threads)
    others = [name for name in supported_isas() if name != isa]
    return f"{isa}, {count} thread{'s' if count > 1 else ''}" + (f"; also: {', '.join(others)}" if others else "")


def native_error() -> str:
    """Why the last native call of this thread failed."""
    return str(native().us_error().decode("utf-8", "replace"))


def native_failure() -> Exception:
    """What to raise for it."""
    message = native_error()
    if message == _OUT_OF_MEMORY:
        return MemoryError("out of memory; answer fewer or shorter texts at once, or use a smaller model")
    return RuntimeError(message)


def require(status: int) -> None:
    """Raise what `native_failure` says unless `status` is 0."""
    if status:
        raise native_failure()


class Runtime:
    """A pool of threads and the kernels of one instruction set. Models made with it keep it alive."""

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.threads, self.isa = choose_threads(threads), isa or choose_isa()
        self.handle = native().us_runtime_create(self.isa.encode(), self.threads)
        if not self.handle:
            raise ValueError(f"threads={self.threads}: {native_error()}")
        self._process = os.getpid()

    def __del__(self) -> None:
        # A forked child has this object but not its threads, so it cannot wait for them.
        if getattr(self, "handle", None) and os.getpid() == self._process:
            native().us_runtime_destroy(self.handle)

    def exp(self, x: Float32) -> Float32:
        """exp of docs/numerics.md for each element."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.empty_like(x)
        require(native().us_exp(self.handle, pointer(x), x.size, pointer(y)))
        return y

    def to_half(self, x: Float32) -> npt.NDArray[np.float16]:
        """float16 of each element, ties to even; a multiple of 16 of them."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.empty(x.shape, dtype=np.float16)
        require(native().us_to_half(self.handle, pointer(x), x.size, pointer(y)))
        return y

    def read_bandwidth(self, num_bytes: int, repeats: int) -> float:
        """Bytes per second that all threads read together from a buffer of `num_bytes`."""
        return float(native().us_measure_read(self.handle, num_bytes, repeats))

    def dot_throughput(self, repeats: int) -> float:
        """Integer multiply-adds per second of all threads together, from the first cache."""
        return float(native().us_measure_dot(self.handle, repeats))


_shared: dict[tuple[str, int], Runtime] = {}


def shared_runtime(threads: int | None = None) -> Runtime:
    """One runtime per instruction set and number of threads: models of a process take turns on its pool."""
    key = (choose_isa(), choose_threads(threads))
    if key not in _shared:
        _shared[key] = Runtime(key[1], key[0])
        _logger.info("native kernels: %s", describe_choice(threads))
    return _shared[key]


@dataclass(frozen=True)
class SourceWeights:
    """A weight as its file holds it: arrays of the file's own types, kept alive while a native call reads them.

    codes: packed words int32 [rows, in·bits/32], or the plain matrix. scale: [rows, groups]. minimum: packed zero
    points int32 [⌈rows·bits/32⌉, groups], float minima like scale, or None. dtype: "F32", "F16" or "BF16" of scale and
    float minimum, or of the plain matrix. bits: of the codes; what a plain matrix is quantized to when it is packed.
    row_ids: int64, the rows to take, or None for all. is_bytes: codes int8 [rows, in] and zero points int8
    [rows, groups] instead, less 128. inputs: how its inputs are quantized, None for groups of 32; group_size may then
    be `in`, a scale per output.
    """

    shape: tuple[int, int]
    codes: npt.NDArray[Any]
    dtype: str
    scale: npt.NDArray[Any] | None = None
    minimum: npt.NDArray[Any] | None = None
    bits: int = 8
    group_size: int = 32
    has_float_minimum: bool = False
    bias: Float32 | None = None
    row_ids: npt.NDArray[np.int64] | None = None
    is_bytes: bool = False
    inputs: LayerInputs | None = None

    def native(self) -> Weights:
        flatten = None if self.inputs is None else self.inputs.flatten
        return Weights(
            outputs=self.shape[0] if self.row_ids is None else len(self.row_ids),
            inputs=self.shape[1],
            codes=pointer(self.codes),
            scale=pointer(self.scale),
            minimum=pointer(self.minimum),
            bias=pointer(self.bias),
            row_ids=pointer(self.row_ids),
            bits=self.bits,
            group_size=self.group_size,
            scale_type=_NUMBER_TYPES[self.dtype],
            is_plain=self.scale is None,
            has_float_minimum=self.has_float_minimum,
            is_bytes=self.is_bytes,
            input_bits=0 if self.inputs is None else self.inputs.grid.bits,
            input_scale=0.0 if self.inputs is None or self.inputs.scale is None else self.inputs.scale,
            flatten=pointer(flatten),
        )


class Matrix:
    """A packed matrix that can be multiplied by itself, for tests and measurements.

    shape: outputs and the inputs of a row, before any flattening.
    """

    def __init__(self, runtime: Runtime, source: SourceWeights) -> None:
        self._runtime = runtime
        weights = source.native()
        channels = None if source.inputs is None else source.inputs.num_channels
        self.shape = int(weights.outputs), int(weights.inputs) if channels is None else channels
        self._handle = native().us_matrix_create(runtime.handle, ctypes.byref(weights))
        if not self._handle:
            raise ValueError(native_error())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            native().us_matrix_destroy(self._handle)

    @property
    def num_bytes(self) -> int:
        """Of the packed form."""
        return int(native().us_matrix_bytes(self._handle))

    def multiply(self, x: Float32, repeats: int = 1) -> Float32:
        """x [rows, in] → [rows, out]; `repeats` times over, to measure it."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"x is {list(x.shape)}, expected [rows, {self.shape[1]}]")
        y = np.empty((x.shape[0], self.shape[0]), dtype=np.float32)
        require(native().us_matrix_multiply(self._handle, pointer(x), x.shape[0], pointer(y), repeats))
        return y
