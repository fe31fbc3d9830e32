"""`GpuModel`: what models on a GPU have in common, whether they answer or only draft."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deploy.formats.architectures import ModelShape
from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.kernels.rope import rope_tables
from deploy.runtime.backend import SEQUENCE_END, Row
from deploy.runtime.drafts import fit_draft
from deploy.runtime.gpu_cache import Place, SlotCache
from deploy.runtime.gpu_draft import NotFiniteError, grow
from deploy.runtime.gpu_forward import Context
from deploy.runtime.gpu_graphs import Computed, Graphs
from deploy.runtime.gpu_inputs import BUCKETS, MOST_ANCESTORS, RowInputs, bucket
from deploy.runtime.gpu_levels import Levels
from deploy.runtime.gpu_ops import Ops
from deploy.runtime.gpu_sampling import greedy_rows
from deploy.runtime.gpu_weights import Head, LanguageModel, Matrix16, num_bytes, read_bytes
from deploy.runtime.sampling import SamplingParams, not_finite_draft
from deploy.runtime.tree import Draft, TreeLimits

Float32 = npt.NDArray[np.float32]
ROWS_AT_ONCE = 512
"""More rows at once gain no speed and need more memory."""


@dataclass(frozen=True)
class Device:
    """Where a model computes, and how. dtype: of what linear layers read and of 16-bit weights. facts: what of the
    device decides how long a forward takes, as plain JSON."""

    torch_device: torch.device
    dtype: torch.dtype
    ops: Ops
    facts: dict[str, Any]


class GpuModel(ABC):
    """A model on a device: the caches of its sequences, forwards by row bucket, and drafts.

    head_ids: int64, the tokens that the head's rows stand for, ascending; None: all. num_states: states of another
    model that a row reads, 0 for a language model.
    """

    row_counts = tuple(sorted({count for size in BUCKETS for count in (size, size + 1)} - {BUCKETS[-1] + 1}))
    """Where a forward's time changes: rows between two buckets cost what the larger one costs."""

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        weights: LanguageModel | Head,
        head_ids: Tensor | None,
        num_states: int = 0,
    ) -> None:
        self.device, self._shape, self.head_ids, self._num_states = device, shape, head_ids, num_states
        self._weight_bytes, self._read_bytes = num_bytes(weights), read_bytes(weights)
        self._cache = SlotCache(shape, device.torch_device)
        cosine, sine = (
            torch.from_numpy(table).to(device.torch_device)
            for table in rope_tables(shape, np.arange(shape.context_length, dtype=np.int64))
        )
        self._context = Context(device.ops, shape, self._cache, cosine, sine, device.dtype)
        self._graphs = Graphs(device.torch_device)
        self._buckets: dict[int, RowInputs] = {}
        self._greedy: dict[int, SamplingRows] = {}

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def device_facts(self) -> dict[str, Any]:
        return self.device.facts

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._weight_bytes

    @property
    def read_bytes(self) -> int:
        """What a token reads of them: of a matrix that is an embedding alone it reads a row, which is not counted."""
        return self._read_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory of all sequences' keys and values."""
        return self._cache.num_bytes

    def length(self, sequence: int) -> int:
        """Rows in the sequence's cache."""
        return self._cache.length(sequence)

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        self._cache.reset(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the sequence's rows from `length` on. Raises ValueError when it has fewer."""
        self._cache.truncate(sequence, length)

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
        fitted = fit_draft(tokens, features, limits, shape=self._shape, num_features=self._num_states, length=length)
        end = length + len(tokens)
        try:
            computed = self._read(sequence, tokens, features)
            with Levels(self, self._cache, sequence, end, fitted, sampling, sample_index) as levels:
                draft = grow(fitted, levels.first(computed), levels.expand)
        except NotFiniteError as error:
            self._cache.drop_rows()
            raise ValueError(not_finite_draft(end + self.drafted_offset - 1)) from error  # or of what follows
        self._cache.keep(sequence, range(len(tokens)))
        self._cache.drop_rows()
        return draft

    def _read(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> Computed:
        """Compute the text's next tokens, which stay provisional; the last one's results are the last there."""
        length = self.length(sequence)
        rows = [Row(token, length + i, sequence, i - 1 if i else SEQUENCE_END) for i, token in enumerate(tokens)]
        places = self._cache.begin(rows)
        self._cache.write_table()
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(begin, min(begin + ROWS_AT_ONCE, len(rows)))
            states = None if features is None else self.read_states(features[part])
            is_last = part.stop == len(rows)
            computed = self._compute(rows[part], places[part], (), [part.stop - begin - 1] if is_last else [], states)
        return computed

    def _compute(
        self,
        rows: Sequence[Row],
        places: Sequence[Place],
        taps: tuple[int, ...],
        head_rows: Sequence[int] | None,
        states: Tensor | None = None,
    ) -> Computed:
        """One forward of at most ROWS_AT_ONCE rows. head_rows: those that get logits, in their order; None: all.

        states: fp32 [len(rows), hidden], of a head.
        """
        longest = max(len(place.ancestors) for place in places)
        size = bucket(len(rows)) if longest <= MOST_ANCESTORS else None
        has_head = head_rows is None or len(head_rows) > 0
        if size is not None:
            inputs = self.bucket_inputs(size)
            inputs.fill(rows, places, self._cache)
            if states is not None:
                inputs.states[: len(rows)] = states
            return self.replay(size, taps, has_head=has_head).part(len(rows), head_rows)
        inputs = self._new_inputs(len(rows), longest)
        inputs.fill(rows, places, self._cache)
        if states is not None:
            inputs.states.copy_(states)
        wanted = None if head_rows is None else torch.tensor(head_rows, dtype=torch.int64).to(self.device.torch_device)
        return self._forward(inputs, taps, wanted, has_head=has_head)

    def replay(self, size: int, taps: tuple[int, ...], *, has_head: bool) -> Computed:
        """The forward of what the bucket's inputs hold."""
        inputs = self.bucket_inputs(size)
        key = (size, taps, has_head)
        return self._graphs.run(
            key, self._cache.generation, lambda: self._forward(inputs, taps, None, has_head=has_head)
        )

    def bucket_inputs(self, size: int) -> RowInputs:
        """The static inputs of a bucket."""
        if size not in self._buckets:
            self._buckets[size] = self._new_inputs(size, MOST_ANCESTORS)
        return self._buckets[size]

    def _new_inputs(self, num_rows: int, num_ancestors: int) -> RowInputs:
        width = self._shape.hidden_size if self._num_states else 0
        return RowInputs(num_rows, num_ancestors, self.device.torch_device, state_width=width)

    def head(self, normed: Tensor, matrix: Matrix16) -> tuple[Tensor, Tensor]:
        """Logits fp32 [rows, head] and greedy tokens int32 [rows] of what the final norm gives."""
        ops = self.device.ops
        logits = ops.linear(normed, matrix, torch.float32)
        if len(logits) not in self._greedy:
            self._greedy[len(logits)] = greedy_rows(len(logits), logits.device)
        return logits, ops.sample(logits, self._greedy[len(logits)], None, None, self.head_ids)

    @property
    @abstractmethod
    def drafted_offset(self) -> int:
        """By how much the position of what a row drafts exceeds the row's own."""

    @abstractmethod
    def read_states(self, features: Float32) -> Tensor:
        """What rows read of another model's states: fp32 [rows, hidden]."""

    @abstractmethod
    def _forward(
        self, inputs: RowInputs, taps: tuple[int, ...], head_rows: Tensor | None, *, has_head: bool
    ) -> Computed:
        """The whole forward on the device; depends on its arguments and the cache alone."""
