"""`CpuBackend`: the `int8` form of docs/numerics.md in native code, one call per forward."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.cpu.library import (
    PHASES,
    Call,
    Float32,
    Runtime,
    Sampling,
    Shape,
    SourceWeights,
    native,
    native_error,
    pointer,
    require,
    shared_runtime,
)
from deploy.kernels.rope import rope_tables
from deploy.runtime.backend import (
    SEQUENCE_END,
    Forward,
    ForwardTokens,
    Row,
    check_rows,
    check_truncation,
    per_row,
)
from deploy.runtime.sampling import SamplingParams

_GROUP = 32  # inputs quantized together
_LANES = 16
_ROPE_POSITIONS = 512  # computed at a time
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_FINAL_NORM = -1


def _check_shape(shape: ModelShape) -> None:
    """The sums of docs/numerics.md need whole groups and lanes."""
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    sizes["num_heads·head_dim"] = shape.num_heads * shape.head_dim
    for key, size in sizes.items():
        if size % _GROUP:
            raise ValueError(f"{key}={size} is not a multiple of {_GROUP}; such models are not supported")
    if shape.head_dim % _LANES:
        raise ValueError(f"head_dim={shape.head_dim} is not a multiple of {_LANES}; such models are not supported")


class _Loader:
    """Packs the weights of a model directory into a native model, tensor by tensor."""

    def __init__(self, directory: ModelDirectory, runtime: Runtime, head_ids: npt.NDArray[np.int64] | None) -> None:
        self._directory, self._head_ids = directory, head_ids
        shape = directory.shape
        native_shape = Shape(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            has_qk_norm=shape.qk_norm,
            rms_norm_eps=shape.rms_norm_eps,
        )
        self.handle = native().us_model_create(runtime.handle, ctypes.byref(native_shape))
        if not self.handle:
            raise RuntimeError(native_error())

    def load(self) -> npt.NDArray[Any] | None:
        """Everything; the embedding's array when it is to be read from the file (it must be kept alive).

        The head comes first: while it is packed, its source's pages are in memory, and nothing else needs as much.
        """
        shape = self._directory.shape
        embedding = self._set_ends()
        for layer in range(shape.num_layers):
            for which, name in enumerate(_NORMS if shape.qk_norm else _NORMS[:2]):
                self._set_norm(layer, which, f"model.layers.{layer}.{name}.weight")
            for which, name in enumerate(_LINEARS):
                self._set_linear(layer, which, f"model.layers.{layer}.{name}")
        self._set_norm(_FINAL_NORM, 0, "model.norm.weight")
        require(native().us_model_finish(self.handle))
        return embedding

    def _check(self, status: int, name: str) -> None:
        if status:
            raise FormatError(f"{self._directory.path}: layer {name!r} {native_error()}")

    def _set_norm(self, layer: int, which: int, name: str) -> None:
        values = self._directory.float32(name)
        self._check(native().us_model_set_norm(self.handle, layer, which, pointer(values), values.size), name)

    def _plain(self, name: str, row_ids: npt.NDArray[np.int64] | None = None) -> SourceWeights:
        values = self._directory.array(name)
        num_out, num_in = values.shape
        return SourceWeights((num_out, num_in), values, self._directory.dtype(name), row_ids=row_ids)

    def _grouped(self, name: str, bits: int, group_size: int) -> SourceWeights:
        if group_size % _GROUP:
            raise ValueError(f"group_size={group_size} is not a multiple of {_GROUP}; use 32, 64 or 128")
        files = self._directory
        layer = files.layers[name]
        scale, dtype, minimum = files.array(f"{name}.weight_scale"), files.dtype(f"{name}.weight_scale"), None
        has_float_minimum = f"{name}.weight_min" in files
        if has_float_minimum and files.dtype(f"{name}.weight_min") != dtype:
            dtype, scale = "F32", files.float32(f"{name}.weight_scale")
            minimum = files.float32(f"{name}.weight_min")
        elif has_float_minimum:
            minimum = files.array(f"{name}.weight_min")
        elif f"{name}.weight_zero_point" in files:
            minimum = files.array(f"{name}.weight_zero_point")
        codes = files.array(f"{name}.weight_packed")
        return SourceWeights(
            (layer.num_out, layer.num_in), codes, dtype, scale, minimum, bits, group_size, has_float_minimum
        )

    def _set_linear(self, layer: int, which: int, name: str) -> None:
        group = self._directory.group(name)
        source = self._plain(f"{name}.weight") if group is None else self._grouped(name, group.bits, group.group_size)
        weights = source.native()
        bias = self._directory.float32(f"{name}.bias") if f"{name}.bias" in self._directory else None
        weights.bias = pointer(bias)
        self._check(native().us_model_set_linear(self.handle, layer, which, ctypes.byref(weights)), name)
        self._directory.release(name)

    def _set_ends(self) -> npt.NDArray[Any] | None:
        """Head and embedding. Tied: one int8 matrix is both, unless the head's vocabulary is trimmed."""
        embedding, is_tied = "model.embed_tokens.weight", self._directory.shape.tied_embeddings
        name = embedding if is_tied else "lm_head.weight"
        head = self._plain(name, self._head_ids)
        self._check(native().us_model_set_head(self.handle, ctypes.byref(head.native())), name)
        values = None
        if not is_tied:
            whole = self._plain(embedding)
            values = whole.codes
            number_type = whole.native().scale_type
            self._check(native().us_model_set_embedding(self.handle, pointer(values), number_type), embedding)
        elif self._head_ids is not None:
            whole = self._plain(embedding)
            self._check(native().us_model_set_embedding_int8(self.handle, ctypes.byref(whole.native())), embedding)
        self._directory.release(name)
        return values


def _native_sampling(params: SamplingParams, sample_index: int) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        top_k=params.top_k,
        seed=params.seed,
        sample_index=sample_index,
    )


def sample_native(
    runtime: Runtime,
    logits: Float32,
    params: SamplingParams,
    *,
    position: int,
    path: Sequence[int] = (),
    sample_index: int = 0,
    token_ids: npt.NDArray[np.int64] | None = None,
) -> int:
    """`deploy.runtime.sampling.sample` in native code; token_ids: ascending ids of the logits, None: 0, 1, 2, …"""
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    tokens = np.asarray(path, dtype=np.int32)
    how = _native_sampling(params, sample_index)
    ids = None if token_ids is None else np.ascontiguousarray(token_ids, dtype=np.int64)
    token = native().us_sample(
        runtime.handle,
        pointer(logits),
        logits.size,
        ctypes.byref(how),
        pointer(tokens),
        tokens.size,
        position,
        pointer(ids),
    )
    if token == -1:
        raise ValueError(_not_finite(position))
    if token < 0:
        raise RuntimeError(native_error())
    return int(token)


def _not_finite(position: int) -> str:
    return f"the logits for position {position} are not finite; the model's weights are not usable"


class CpuBackend:
    """Backend (see deploy/runtime/backend.py) in native code: the same bits as ReferenceBackend's `int8` form.

    threads: how many to compute with; by default what the process may use (deploy/kernels/cpu/threads.py).
    head_ids: token ids, ascending, that the head is cut down to (a trimmed vocabulary); logits then have one column
    for each, and tokens are still ids of the whole vocabulary. Raises ValueError for what is not supported.
    """

    def __init__(
        self,
        directory: ModelDirectory | str | Path,
        *,
        threads: int | None = None,
        head_ids: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._directory = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
        self._shape = self._directory.shape
        _check_shape(self._shape)
        ids = None if head_ids is None else np.ascontiguousarray(head_ids, dtype=np.int64)
        if ids is not None and (
            not ids.size or ids[0] < 0 or ids[-1] >= self._shape.vocab_size or (np.diff(ids) <= 0).any()
        ):
            raise ValueError(f"head_ids must ascend and lie in 0 … {self._shape.vocab_size - 1}")
        self._num_logits = self._shape.vocab_size if ids is None else len(ids)
        self.runtime = shared_runtime(threads)
        loader = _Loader(self._directory, self.runtime, ids)
        self._handle = loader.handle
        self._embedding = loader.load()
        self._num_rope = 0
        self._lengths: dict[int, int] = {}
        self._rows: Sequence[Row] = []
        self._provisional: set[int] = set()  # sequences whose rows of the last call are still there

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            native().us_model_destroy(self._handle)

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return int(native().us_model_weight_bytes(self._handle))

    @property
    def cache_bytes(self) -> int:
        """Memory of all sequences' keys and values."""
        return int(native().us_model_cache_bytes(self._handle))

    @contextmanager
    def phase_times(self, into: dict[str, float]) -> Iterator[None]:
        """Adds the seconds of the forward passes within the `with` block to `into`, by kind of phase.

        Inputs of up to eight rows are quantized within the phase of the linear layers that read them.
        """
        require(native().us_model_time_phases(self._handle, 1))
        try:
            yield
        finally:
            seconds = np.zeros(len(PHASES))
            native().us_model_phase_times(self._handle, pointer(seconds))
            require(native().us_model_time_phases(self._handle, 0))
            for name, spent in zip(PHASES, seconds.tolist(), strict=True):
                into[name] = into.get(name, 0.0) + spent

    def length(self, sequence: int) -> int:
        return self._lengths.get(sequence, 0)

    def reset(self, sequence: int) -> None:
        native().us_model_reset(self._handle, sequence)
        self._lengths.pop(sequence, None)
        self._provisional.discard(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        check_truncation(length, self.length(sequence))
        if sequence in self._lengths:
            require(native().us_model_truncate(self._handle, sequence, length))
            self._lengths[sequence] = length
            self._provisional.discard(sequence)

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        if sequence not in self._lengths:
            if path:
                raise ValueError(f"keep: sequence {sequence} had no rows in the last call")
            return
        parent = SEQUENCE_END
        for index in path:
            is_row = sequence in self._provisional and 0 <= index < len(self._rows)
            if not is_row or self._rows[index].sequence != sequence or self._rows[index].parent != parent:
                raise ValueError(f"keep: row {index} does not follow row {parent} in the last call's sequence")
            parent = index
        rows = np.array(path, dtype=np.int32)
        require(native().us_model_keep(self._handle, sequence, pointer(rows), len(rows)))
        self._lengths[sequence] += len(rows)
        self._provisional.discard(sequence)

    def forward(
        self, rows: Sequence[Row], taps: Sequence[int] = (), *, logit_rows: Sequence[int] | None = None
    ) -> Forward:
        self._check(rows, taps, logit_rows)
        num_logits = len(rows) if logit_rows is None else len(logit_rows)
        logits = np.empty((num_logits, self._num_logits), dtype=np.float32)
        tapped = self._run(rows, taps, logit_rows, logits=logits)
        return Forward(logits, tapped)

    def forward_tokens(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams | Sequence[SamplingParams],
        taps: Sequence[int] = (),
        *,
        token_rows: Sequence[int] | None = None,
        sample_index: int | Sequence[int] = 0,
    ) -> ForwardTokens:
        """Like `forward`, but choose the token that follows each of `token_rows` (default: all) natively.

        The path that a repetition penalty looks at is the row's own: its sequence's cache, its ancestors, itself.
        sampling, sample_index: one for all, or one for each of `token_rows`. Raises ValueError, besides what
        `forward` raises, when logits are not finite.
        """
        self._check(rows, taps, token_rows)
        wanted = range(len(rows)) if token_rows is None else token_rows
        params, indices = per_row(len(wanted), sampling, sample_index)
        how = (Sampling * max(1, len(wanted)))(*map(_native_sampling, params, indices))
        chosen = np.empty(len(wanted), dtype=np.int64)
        tapped = self._run(rows, taps, token_rows, how=how, chosen=chosen)
        tokens = [int(token) for token in chosen]
        for index, token in zip(wanted, tokens, strict=True):
            if token < 0:
                raise ValueError(_not_finite(rows[index].position + 1))
        return ForwardTokens(tokens, tapped)

    def _check(self, rows: Sequence[Row], taps: Sequence[int], chosen_rows: Sequence[int] | None) -> None:
        check_rows(rows, self._shape, self._lengths)
        for layer in taps:
            if not 0 <= layer <= self._shape.num_layers:
                raise ValueError(f"taps={list(taps)}: layer {layer} is not in 0…{self._shape.num_layers}")
        for index in chosen_rows or ():
            if not 0 <= index < len(rows):
                raise ValueError(f"logit_rows={list(chosen_rows or ())}: there are {len(rows)} rows")

    def _grow_rope(self, length: int) -> None:
        """Rotary tables for positions below `length`."""
        while self._num_rope < length:
            positions = np.arange(self._num_rope, self._num_rope + _ROPE_POSITIONS)
            cosine, sine = rope_tables(self._shape, positions)
            require(native().us_model_add_rope(self._handle, pointer(cosine), pointer(sine), len(positions)))
            self._num_rope += len(positions)

    def _run(
        self,
        rows: Sequence[Row],
        taps: Sequence[int],
        head_rows: Sequence[int] | None,
        *,
        logits: Float32 | None = None,
        how: ctypes.Array[Sampling] | None = None,
        chosen: npt.NDArray[np.int64] | None = None,
    ) -> dict[int, Float32]:
        count = len(rows)
        tokens = np.array([row.token for row in rows], dtype=np.int32)
        positions = np.array([row.position for row in rows], dtype=np.int32)
        parents = np.array([row.parent for row in rows], dtype=np.int32)
        sequences = np.array([row.sequence for row in rows], dtype=np.int64)
        heads = np.arange(count, dtype=np.int64) if head_rows is None else np.array(head_rows, dtype=np.int64)
        layers = np.unique(np.array(taps, dtype=np.int32))
        tapped = np.empty((len(layers), count, self._shape.hidden_size), dtype=np.float32)
        self._grow_rope(int(positions.max()) + 1)
        call = Call(
            num_rows=count,
            tokens=pointer(tokens),
            positions=pointer(positions),
            parents=pointer(parents),
            sequences=pointer(sequences),
            num_taps=len(layers),
            tap_layers=pointer(layers),
            taps=pointer(tapped),
            num_head_rows=len(heads),
            head_rows=pointer(heads),
            logits=pointer(logits),
            sampling=None if how is None else ctypes.addressof(how),
            chosen=pointer(chosen),
        )
        self._rows = list(rows)
        self._provisional = set(sequences.tolist())
        for sequence in self._provisional:
            self._lengths.setdefault(sequence, 0)
        require(native().us_model_forward(self._handle, ctypes.byref(call)))
        return {int(layer): tapped[i] for i, layer in enumerate(layers)}
