"""`CpuModel`: what native models have in common, whether they answer or only draft."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from deploy.formats.architectures import ModelShape
from deploy.kernels.cpu.library import (
    PHASES,
    DraftCall,
    Float32,
    Runtime,
    address,
    native,
    native_failure,
    pointer,
    require,
)
from deploy.kernels.rope import rope_tables
from deploy.runtime.backend import Row, check_truncation
from deploy.runtime.cpu_loader import Loaded
from deploy.runtime.cpu_sampling import native_sampling
from deploy.runtime.drafts import fit_draft
from deploy.runtime.sampling import SamplingParams, not_finite_draft
from deploy.runtime.tree import Draft, TreeLimits

_ROPE_POSITIONS = 512  # computed at a time


class CpuModel:
    """A native model: its weights, the caches of its sequences, and drafts.

    loaded: owned from now on. num_features: states of another model that a row reads, 0 for a language model.
    """

    def __init__(self, loaded: Loaded, shape: ModelShape, runtime: Runtime, num_features: int = 0) -> None:
        self._loaded, self._shape, self.runtime, self._num_features = loaded, shape, runtime, num_features
        self._num_rope = 0
        self._lengths: dict[int, int] = {}
        self._rows: list[Row] = []  # provisional ones of a language model, as `keep` counts them
        self._provisional: dict[int, int] = {}  # sequence → the first of them that it still has

    def __del__(self) -> None:
        if hasattr(self, "_loaded"):
            native().us_model_destroy(self.handle)

    @property
    def handle(self) -> int:
        """The native model; valid as long as this object."""
        return self._loaded.handle

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return int(native().us_model_weight_bytes(self.handle))

    @property
    def read_bytes(self) -> int:
        """What a token reads of them: of a matrix that is an embedding alone it reads a row, which is not counted."""
        return self.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory of all sequences' keys and values."""
        return int(native().us_model_cache_bytes(self.handle))

    @contextmanager
    def phase_times(self, into: dict[str, float]) -> Iterator[None]:
        """Adds the seconds of the forward passes within the `with` block to `into`, by kind of phase.

        Inputs of up to eight rows are quantized within the phase of the linear layers that read them.
        """
        require(native().us_model_time_phases(self.handle, 1))
        try:
            yield
        finally:
            seconds = np.zeros(len(PHASES))
            native().us_model_phase_times(self.handle, pointer(seconds))
            require(native().us_model_time_phases(self.handle, 0))
            for name, spent in zip(PHASES, seconds.tolist(), strict=True):
                into[name] = into.get(name, 0.0) + spent

    def length(self, sequence: int) -> int:
        """Rows in the sequence's cache."""
        return self._lengths.get(sequence, 0)

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        native().us_model_reset(self.handle, sequence)
        self._lengths.pop(sequence, None)
        self._provisional.pop(sequence, None)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the sequence's rows from `length` on. Raises ValueError when it has fewer."""
        check_truncation(length, self.length(sequence))
        if sequence in self._lengths:
            require(native().us_model_truncate(self.handle, sequence, length))
            self._lengths[sequence] = length
            self._provisional.pop(sequence, None)

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
        fitted = fit_draft(tokens, features, limits, shape=self._shape, num_features=self._num_features, length=length)
        end = length + len(tokens)
        self._grow_rope(end + fitted.depth - 1)
        ids = array("i", tokens)
        states = None if features is None else np.ascontiguousarray(features)
        how = native_sampling(sampling, sample_index)
        room = bytes(4 * fitted.num_nodes)
        drafted, parents, scores = array("i", room), array("i", room), array("f", room)
        call = DraftCall(
            sequence=sequence,
            num_tokens=len(ids),
            tokens=address(ids),
            features=pointer(states),
            sampling=ctypes.addressof(how),
            depth=fitted.depth,
            width=fitted.width,
            num_nodes=fitted.num_nodes,
            min_probability=fitted.min_probability,
            min_gain=fitted.min_gain,
            drafted=address(drafted),
            parents=address(parents),
            scores=address(scores),
        )
        self._forget_rows()
        try:
            count = native().us_model_draft(self.handle, ctypes.byref(call))
        finally:  # an interrupt comes when the call returns, and it has read the tokens
            self._lengths[sequence] = int(native().us_model_length(self.handle, sequence))
        if count == -1:
            raise ValueError(not_finite_draft(end + (1 if self._num_features else 0)))  # or of what follows
        if count < 0:
            raise native_failure()
        return Draft(tuple(drafted[:count]), tuple(parents[:count]), tuple(scores[:count]))

    def _forget_rows(self) -> None:
        self._rows, self._provisional = [], {}

    def _grow_rope(self, length: int) -> None:
        """Rotary tables for positions below `length`."""
        while self._num_rope < length:
            positions = np.arange(self._num_rope, self._num_rope + _ROPE_POSITIONS)
            cosine, sine = rope_tables(self._shape, positions)
            require(native().us_model_add_rope(self.handle, pointer(cosine), pointer(sine), len(positions)))
            self._num_rope += len(positions)
