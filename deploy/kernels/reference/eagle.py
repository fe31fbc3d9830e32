"""`ReferenceEagle`: an EAGLE-3 head (arXiv 2503.01840) as docs/numerics.md defines it, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.safetensors_file import from_bfloat16
from deploy.formats.speculators import EMBEDDING, EagleDirectory
from deploy.kernels.reference.cache import SequenceCache
from deploy.kernels.reference.candidates import Candidates, candidates
from deploy.kernels.reference.draft import grow
from deploy.kernels.reference.fp32 import Float32
from deploy.kernels.reference.layers import (
    ROWS_AT_ONCE,
    DecoderLayer,
    build_head_linear,
    check_shape,
    rms_norm,
    run_layer,
)
from deploy.kernels.reference.linear import Linear
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row, check_rows, check_truncation
from deploy.runtime.drafts import fit_draft
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits


class ReferenceEagle:
    """DraftModel (see deploy/runtime/drafters/base.py), slowly.

    Computes in the form of `target` (its activations), whose embedding it reads unless the head has a copy.
    Raises ValueError for a head that does not fit the target.
    """

    def __init__(self, head: EagleDirectory, target: ReferenceBackend) -> None:
        head.config.check_target(target.shape)
        check_shape(head.config.layer)
        self._head, self._target, self._config = head, target, head.config
        self._fc = self._linear("fc")
        self._layer = DecoderLayer(
            input_norm=self._vector("layers.0.input_layernorm"),
            q=self._linear("layers.0.self_attn.q_proj"),
            k=self._linear("layers.0.self_attn.k_proj"),
            v=self._linear("layers.0.self_attn.v_proj"),
            q_norm=None,
            k_norm=None,
            o=self._linear("layers.0.self_attn.o_proj"),
            post_attention_norm=self._vector("layers.0.post_attention_layernorm"),
            gate=self._linear("layers.0.mlp.gate_proj"),
            up=self._linear("layers.0.mlp.up_proj"),
            down=self._linear("layers.0.mlp.down_proj"),
        )
        self._hidden_norm, self._norm = self._vector("layers.0.hidden_norm"), self._vector("norm")
        self._lm_head = self._linear("lm_head")
        self._caches: dict[int, SequenceCache] = {}

    def _vector(self, name: str) -> Float32:
        return self._head.float32(f"{name}.weight")

    def _linear(self, name: str) -> Linear:
        return build_head_linear(self._vector(name), self._target.activations)

    @property
    def shape(self) -> ModelShape:
        return self._config.layer

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self._config.feature_layers

    def length(self, sequence: int) -> int:
        return self._caches[sequence].length if sequence in self._caches else 0

    def truncate(self, sequence: int, length: int) -> None:
        check_truncation(length, self.length(sequence))
        if sequence in self._caches:
            self._caches[sequence].truncate(length)

    def reset(self, sequence: int) -> None:
        self._caches.pop(sequence, None)

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
        length, num_certain = self.length(sequence), len(tokens)
        fitted = fit_draft(
            tokens, features, limits, shape=self.shape, num_features=len(self.feature_layers), length=length
        )
        assert features is not None
        certain = [Row(token, length + i, sequence, i - 1) for i, token in enumerate(tokens)]

        def expand(tree: Sequence[tuple[int, int]], first: int) -> list[Candidates]:
            rows = list(certain)
            for token, parent in tree[1:]:
                before = parent + num_certain - 1
                rows.append(Row(token, rows[before].position + 1, sequence, before))
            logits, _ = self.forward(rows, features)
            return [
                candidates(
                    logits[row],
                    sampling,
                    fitted.width,
                    position=rows[row].position + 2,
                    path=self._caches[sequence].path_tokens(row, rows),
                    sample_index=sample_index,
                    token_ids=self._head.draft_ids,
                )
                for row in range(first + num_certain - 1, len(rows))
            ]

        try:
            draft = grow(fitted, tokens[-1], expand)
        except ValueError:
            self.truncate(sequence, length)
            raise
        self._caches[sequence].keep(range(num_certain), certain)
        return draft

    def forward(self, rows: Sequence[Row], features: Float32) -> tuple[Float32, Float32]:
        """Logits [len(rows), draft vocabulary] and outputs [len(rows), hidden] of rows that stay provisional.

        The first len(features) rows read those, float32 [n, states · hidden]; each other row its parent's output.
        """
        check_rows(rows, self.shape, {key: cache.length for key, cache in self._caches.items()})
        for sequence in sorted({row.sequence for row in rows} | set(self._caches)):
            self._caches.setdefault(sequence, SequenceCache(self.shape)).begin(rows, sequence)
        outputs = np.empty((len(rows), self.shape.hidden_size), dtype=np.float32)
        for begin in range(0, len(features), ROWS_AT_ONCE):
            part = slice(begin, min(begin + ROWS_AT_ONCE, len(features)))
            chunk = {index: rows[index] for index in range(part.start, part.stop)}
            outputs[part] = self._run(chunk, self._fc(features[part]))
        for index in range(len(features), len(rows)):
            row = rows[index]
            outputs[index] = self._run({index: row}, outputs[[row.parent]])[0]
        return self._lm_head(rms_norm(outputs, self._norm, self.shape.rms_norm_eps)), outputs

    def _run(self, rows: dict[int, Row], state: Float32) -> Float32:
        """The layer's outputs for rows that read `state`, [len(rows), hidden]."""
        eps = self.shape.rms_norm_eps
        embedded = self._embed(np.array([row.token for row in rows.values()]))
        normed = rms_norm(state, self._hidden_norm, eps)
        joined = np.concatenate([rms_norm(embedded, self._layer.input_norm, eps), normed], axis=1)
        x = normed if self._config.norm_before_residual else state
        return run_layer(self.shape, 0, self._layer, x, joined, rows, self._caches)

    def _embed(self, tokens: npt.NDArray[np.int64]) -> Float32:
        if self._config.embedding == "reference":
            return self._target.embed(tokens)
        return from_bfloat16(self._head.array(EMBEDDING)[tokens])
