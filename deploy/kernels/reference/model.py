"""`ReferenceBackend`: the whole forward of docs/numerics.md in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.reference.cache import SequenceCache
from deploy.kernels.reference.candidates import Candidates, candidates
from deploy.kernels.reference.draft import grow
from deploy.kernels.reference.fp32 import Float32
from deploy.kernels.reference.layers import (
    ROWS_AT_ONCE,
    Activations,
    DecoderLayer,
    build_linear,
    check_shape,
    rms_norm,
    run_layer,
)
from deploy.kernels.reference.linear import GROUP, Linear, quantize_groups
from deploy.runtime.backend import (
    NO_TOKEN,
    Forward,
    ForwardTokens,
    Row,
    check_outputs,
    check_path,
    check_rows,
    check_truncation,
    per_row,
)
from deploy.runtime.drafts import fit_draft
from deploy.runtime.sampling import SamplingParams, sample
from deploy.runtime.tree import Draft, TreeLimits

Watch = Callable[[str, Float32], None]


class _Watched:
    """A linear layer that shows what it reads."""

    def __init__(self, layer: Linear, name: str, watch: Watch) -> None:
        self._layer, self._name, self._watch = layer, name, watch

    def __call__(self, x: Float32) -> Float32:
        self._watch(self._name, x)
        return self._layer(x)


class _Loader:
    """Builds linear layers and the embedding for one activation type, releasing file pages behind itself."""

    def __init__(self, directory: ModelDirectory, activations: Activations, watch: Watch | None) -> None:
        self._directory, self._activations, self._watch = directory, activations, watch

    def vector(self, name: str) -> Float32:
        return self._directory.float32(f"{name}.weight")

    def linear(self, name: str) -> Linear:
        bias = self._directory.float32(f"{name}.bias") if f"{name}.bias" in self._directory.names() else None
        inputs = self._directory.inputs(name)
        layer = build_linear(self._directory.linear(name), bias, self._activations, inputs)
        self._directory.release(name)
        return layer if self._watch is None else _Watched(layer, name, self._watch)

    def layer(self, index: int) -> DecoderLayer:
        name, qk_norm = f"model.layers.{index}", self._directory.shape.qk_norm
        return DecoderLayer(
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
        return build_linear(self.vector(name), None, self._activations)


class ReferenceBackend:
    """Backend (see deploy/runtime/backend.py) that computes exactly what docs/numerics.md says, slowly."""

    def __init__(
        self,
        directory: ModelDirectory | str | Path,
        *,
        activations: Activations = "int8",
        watch: Watch | None = None,
    ) -> None:
        """watch: called with the name of every linear layer that is computed and the rows [n, in] that it reads."""
        if activations not in get_args(Activations):
            raise ValueError(f"activations={activations!r} is not supported; use {', '.join(get_args(Activations))}")
        self._directory = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
        self._shape = self._directory.shape
        check_shape(self._shape)
        self.activations = activations
        loader = _Loader(self._directory, activations, watch)
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
        cache = self._caches.get(sequence)
        check_path(sequence, path, {index: self._rows[index] for index in cache.paths} if cache else {})
        if cache:
            cache.keep(path, self._rows)

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
            if not np.isfinite(logits).all():
                tokens.append(NO_TOKEN)
                continue
            path = self._caches[rows[row].sequence].path_tokens(row, rows)
            tokens.append(sample(logits, how, position=rows[row].position + 1, path=path, sample_index=index))
        return ForwardTokens(tokens, computed.taps)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """A language model drafts from the text alone."""
        return ()

    def draft(
        self,
        sequence: int,
        tokens: Sequence[int],
        features: Float32 | None,
        limits: TreeLimits,
        sampling: SamplingParams,
        sample_index: int = 0,
    ) -> Draft:
        """As of a DraftModel (deploy/runtime/drafters/base.py)."""
        length = self.length(sequence)
        fitted = fit_draft(tokens, features, limits, shape=self._shape, num_features=0, length=length)
        start = length + len(tokens) - 1

        def expand(tree: Sequence[tuple[int, int]], first: int) -> list[Candidates]:
            rows: list[Row] = []
            for token, parent in tree:
                rows.append(Row(token, start if parent < 0 else rows[parent].position + 1, sequence, parent))
            wanted = range(first, len(rows))
            logits = self.forward(rows, logit_rows=wanted).logits
            return [
                candidates(
                    logits[i],
                    sampling,
                    fitted.width,
                    position=rows[row].position + 1,
                    path=self._caches[sequence].path_tokens(row, rows),
                    sample_index=sample_index,
                )
                for i, row in enumerate(wanted)
            ]

        try:
            if len(tokens) > 1:
                self.forward(
                    [Row(token, length + i, sequence, i - 1) for i, token in enumerate(tokens[:-1])], logit_rows=[]
                )
                self.keep(sequence, range(len(tokens) - 1))
            draft = grow(fitted, tokens[-1], expand)
        except ValueError:
            self.truncate(sequence, length)
            raise
        self.keep(sequence, [0])
        return draft

    def forward(
        self, rows: Sequence[Row], taps: Sequence[int] = (), *, logit_rows: Sequence[int] | None = None
    ) -> Forward:
        check_rows(rows, self._shape, {key: cache.length for key, cache in self._caches.items()})
        check_outputs(len(rows), taps, logit_rows, self._shape)
        self._rows = list(rows)
        for sequence in sorted({row.sequence for row in rows} | set(self._caches)):
            cache = self._caches.setdefault(sequence, SequenceCache(self._shape))
            cache.begin(rows, sequence)
        final = np.empty((len(rows), self._shape.hidden_size), dtype=np.float32)
        tapped = {layer: np.empty_like(final) for layer in taps}
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            chunk = np.arange(begin, min(begin + ROWS_AT_ONCE, len(rows)))
            final[chunk] = self._run_layers(chunk, tapped)
        wanted = final if logit_rows is None else final[list(logit_rows)]
        if len(wanted) == 0:
            return Forward(np.empty((0, self._shape.vocab_size), dtype=np.float32), tapped)
        return Forward(self._head(rms_norm(wanted, self._norm, self._shape.rms_norm_eps)), tapped)

    def embed(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding; where it is tied and the head is int8, the head's own int8 rows."""
        values = self._directory.rows_float32("model.embed_tokens.weight", tokens)
        if self._shape.tied_embeddings and self.activations == "int8":
            codes, scale = quantize_groups(values)
            return codes.astype(np.float32) * np.repeat(scale, GROUP, axis=1)
        return values

    def _run_layers(self, chunk: npt.NDArray[np.int64], tapped: dict[int, Float32]) -> Float32:
        """Residual stream after the last layer, [len(chunk), hidden]; fills caches and taps of these rows."""
        rows = {index: self._rows[index] for index in chunk.tolist()}
        x = self.embed(np.array([row.token for row in rows.values()]))
        for index, layer in enumerate(self._layers):
            if index in tapped:
                tapped[index][chunk] = x
            h = rms_norm(x, layer.input_norm, self._shape.rms_norm_eps)
            x = run_layer(self._shape, index, layer, x, h, rows, self._caches)
        if self._shape.num_layers in tapped:
            tapped[self._shape.num_layers][chunk] = x
        return x
