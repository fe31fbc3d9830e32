"""`ReferenceBackend`: the whole forward of docs/numerics.md in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from deploy.kernels.reference.attention import attend, rotate
from deploy.kernels.reference.cache import SequenceCache
from deploy.kernels.reference.fp32 import LANES, Float32, lane_dot, round_half, silu32
from deploy.kernels.reference.linear import GROUP, FloatLinear, Int8Linear, Linear, quantize_groups
from deploy.kernels.rope import rope_tables
from deploy.runtime.backend import Forward, ForwardTokens, Row, check_rows, check_truncation, per_row
from deploy.runtime.sampling import SamplingParams, sample

# float32 rounds nothing; it exists to compare with other implementations.
Activations = Literal["int8", "bf16", "float32"]
_ROWS_AT_ONCE = 64


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """(x · 1/sqrt(mean(x²) + eps)) · weight over the last axis; the sum of squares in 16 lanes."""
    mean = lane_dot(x, x) / np.float32(x.shape[-1])
    factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return (x * factor[..., None]) * weight


@dataclass(frozen=True)
class _Layer:
    input_norm: Float32
    q: Linear
    k: Linear
    v: Linear
    q_norm: Float32 | None
    k_norm: Float32 | None
    o: Linear
    post_attention_norm: Float32
    gate: Linear
    up: Linear
    down: Linear


class _Loader:
    """Builds linear layers and the embedding for one activation type, releasing file pages behind itself."""

    def __init__(self, directory: ModelDirectory, activations: Activations) -> None:
        self._directory, self._activations = directory, activations

    def vector(self, name: str) -> Float32:
        return self._directory.float32(f"{name}.weight")

    def _build(self, weight: GroupedInt | Float32, bias: Float32 | None) -> Linear:
        if self._activations == "int8":
            if isinstance(weight, GroupedInt):
                return Int8Linear.from_grouped(weight, bias)
            return Int8Linear.from_float(weight, bias)
        values = weight.dequantize() if isinstance(weight, GroupedInt) else weight
        return FloatLinear(values, bias, is_rounded=self._activations == "bf16")

    def linear(self, name: str) -> Linear:
        bias = self._directory.float32(f"{name}.bias") if f"{name}.bias" in self._directory.names() else None
        layer = self._build(self._directory.linear(name), bias)
        self._directory.release(name)
        return layer

    def layer(self, index: int) -> _Layer:
        name, qk_norm = f"model.layers.{index}", self._directory.shape.qk_norm
        return _Layer(
            input_norm=self.vector(f"{name}.input_layernorm"),
            q=self.linear(f"{name}.self_attn.q_proj"),
            k=self.linear(f"{name}.self_attn.k_proj"),
            v=self.linear(f"{name}.self_attn.v_proj"),
            q_norm=self.vector(f"{name}.self_attn.q_norm") if qk_norm else None,
            k_norm=self.vector(f"{name}.self_attn.k_norm") if qk_norm else None,
            o=self.linear(f"{name}.self_attn.o_proj"),
            post_attention_norm=self.vector(f"{name}.post_attention_layernorm"),
            gate=self.linear(f"{name}.mlp.gate_proj"),
            up=self.linear(f"{name}.mlp.up_proj"),
            down=self.linear(f"{name}.mlp.down_proj"),
        )

    def head(self) -> Linear:
        name = "model.embed_tokens" if self._directory.shape.tied_embeddings else "lm_head"
        return self._build(self.vector(name), None)


def _check_shape(shape: ModelShape) -> None:
    """The sums of docs/numerics.md need whole groups and lanes."""
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    sizes["num_heads·head_dim"] = shape.num_heads * shape.head_dim
    for key, size in sizes.items():
        if size % GROUP:
            raise ValueError(f"{key}={size} is not a multiple of {GROUP}; such models are not supported")
    if shape.head_dim % LANES:
        raise ValueError(f"head_dim={shape.head_dim} is not a multiple of {LANES}; such models are not supported")


class ReferenceBackend:
    """Backend (see deploy/runtime/backend.py) that computes exactly what docs/numerics.md says, slowly."""

    def __init__(self, directory: ModelDirectory | str | Path, *, activations: Activations = "int8") -> None:
        if activations not in get_args(Activations):
            raise ValueError(f"activations={activations!r} is not supported; use {', '.join(get_args(Activations))}")
        self._directory = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
        self._shape = self._directory.shape
        _check_shape(self._shape)
        self.activations = activations
        loader = _Loader(self._directory, activations)
        self._layers = [loader.layer(index) for index in range(self._shape.num_layers)]
        self._norm = loader.vector("model.norm")
        self._head = loader.head()
        self._caches: dict[int, SequenceCache] = {}
        self._rows: list[Row] = []

    @property
    def shape(self) -> ModelShape:
        return self._shape

    def length(self, sequence: int) -> int:
        return self._caches[sequence].length if sequence in self._caches else 0

    def reset(self, sequence: int) -> None:
        self._caches.pop(sequence, None)

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        if sequence in self._caches:
            self._caches[sequence].keep(path, self._rows)
        elif path:
            raise ValueError(f"keep: sequence {sequence} had no rows in the last call")

    def truncate(self, sequence: int, length: int) -> None:
        check_truncation(length, self.length(sequence))
        if sequence in self._caches:
            self._caches[sequence].truncate(length)

    def forward_tokens(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams | Sequence[SamplingParams],
        taps: Sequence[int] = (),
        *,
        token_rows: Sequence[int] | None = None,
        sample_index: int | Sequence[int] = 0,
    ) -> ForwardTokens:
        wanted = list(range(len(rows))) if token_rows is None else list(token_rows)
        params, indices = per_row(len(wanted), sampling, sample_index)
        computed = self.forward(rows, taps, logit_rows=wanted)
        tokens = []
        for logits, row, how, index in zip(computed.logits, wanted, params, indices, strict=True):
            path = self._caches[rows[row].sequence].path_tokens(row, rows)
            tokens.append(sample(logits, how, position=rows[row].position + 1, path=path, sample_index=index))
        return ForwardTokens(tokens, computed.taps)

    def forward(
        self, rows: Sequence[Row], taps: Sequence[int] = (), *, logit_rows: Sequence[int] | None = None
    ) -> Forward:
        check_rows(rows, self._shape, {key: cache.length for key, cache in self._caches.items()})
        for layer in taps:
            if not 0 <= layer <= self._shape.num_layers:
                raise ValueError(f"taps={list(taps)}: layer {layer} is not in 0…{self._shape.num_layers}")
        for index in logit_rows or ():
            if not 0 <= index < len(rows):
                raise ValueError(f"logit_rows={list(logit_rows or ())}: there are {len(rows)} rows")
        self._rows = list(rows)
        for sequence in sorted({row.sequence for row in rows} | set(self._caches)):
            cache = self._caches.setdefault(sequence, SequenceCache(self._shape))
            cache.begin(rows, sequence)
        final = np.empty((len(rows), self._shape.hidden_size), dtype=np.float32)
        tapped = {layer: np.empty_like(final) for layer in taps}
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = np.arange(begin, min(begin + _ROWS_AT_ONCE, len(rows)))
            final[chunk] = self._run_layers(chunk, tapped)
        wanted = final if logit_rows is None else final[list(logit_rows)]
        if len(wanted) == 0:
            return Forward(np.empty((0, self._shape.vocab_size), dtype=np.float32), tapped)
        return Forward(self._head(rms_norm(wanted, self._norm, self._shape.rms_norm_eps)), tapped)

    def _embed(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding; where it is tied and the head is int8, the head's own int8 rows."""
        values = self._directory.rows_float32("model.embed_tokens.weight", tokens)
        if self._shape.tied_embeddings and self.activations == "int8":
            codes, scale = quantize_groups(values)
            return codes.astype(np.float32) * np.repeat(scale, GROUP, axis=1)
        return values

    def _run_layers(self, chunk: npt.NDArray[np.int64], tapped: dict[int, Float32]) -> Float32:
        """Residual stream after the last layer, [len(chunk), hidden]; fills caches and taps of these rows."""
        rows = [self._rows[index] for index in chunk]
        tables = rope_tables(self._shape, np.array([row.position for row in rows]))
        x = self._embed(np.array([row.token for row in rows]))
        eps = self._shape.rms_norm_eps
        for index, layer in enumerate(self._layers):
            if index in tapped:
                tapped[index][chunk] = x
            x = x + layer.o(self._attention(index, layer, rms_norm(x, layer.input_norm, eps), chunk, tables))
            h = rms_norm(x, layer.post_attention_norm, eps)
            x = x + layer.down(silu32(layer.gate(h)) * layer.up(h))
        if self._shape.num_layers in tapped:
            tapped[self._shape.num_layers][chunk] = x
        return x

    def _attention(
        self, index: int, layer: _Layer, h: Float32, chunk: npt.NDArray[np.int64], tables: tuple[Float32, Float32]
    ) -> Float32:
        shape, count = self._shape, len(chunk)
        q = layer.q(h).reshape(count, shape.num_heads, shape.head_dim)
        k = layer.k(h).reshape(count, shape.num_kv_heads, shape.head_dim)
        v = layer.v(h).reshape(count, shape.num_kv_heads, shape.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, shape.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, shape.rms_norm_eps)
        q, k = rotate(q, *tables), rotate(k, *tables)
        output = np.empty((count, shape.num_heads * shape.head_dim), dtype=np.float32)
        of_row = np.array([self._rows[i].sequence for i in chunk])
        for sequence in np.unique(of_row):
            cache, mine = self._caches[int(sequence)], np.flatnonzero(of_row == sequence)
            own = [cache.paths[int(chunk[i])] for i in mine]
            slots = [path[-1] for path in own]
            cache.keys[index, slots], cache.values[index, slots] = round_half(k[mine]), round_half(v[mine])
            lengths = np.array([len(path) for path in own])
            paths = np.zeros((len(own), int(lengths.max())), dtype=np.int64)
            for i, path in enumerate(own):
                paths[i, : len(path)] = path
            output[mine] = attend(q[mine], cache.keys[index], cache.values[index], paths, lengths)
        return output
