"""The rows of a draft's levels: where they lie in the cache, and what their forwards read, without asking the host."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.runtime.gpu_cache import SlotCache
from deploy.runtime.gpu_draft import Candidates, Expansion
from deploy.runtime.gpu_graphs import Computed
from deploy.runtime.gpu_inputs import bucket
from deploy.runtime.gpu_sampling import part_of
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits

if TYPE_CHECKING:
    from deploy.runtime.gpu_model import GpuModel


class Levels:
    """A draft behind `end` rows of a sequence, all of which the slot table holds.

    What the host knows of every level (positions, slots) goes to the device at once, before the first one. Its slots
    are borrowed until the `with` block ends.
    """

    def __init__(
        self,
        model: GpuModel,
        cache: SlotCache,
        sequence: int,
        end: int,
        limits: TreeLimits,
        sampling: SamplingParams,
        sample_index: int,
    ) -> None:
        self._model, self._cache, self._end, self._width = model, cache, end, limits.width
        size = bucket(limits.width)
        assert size is not None
        self._size, self._inputs = size, model.bucket_inputs(size)
        num_levels = limits.depth - 1
        self._slots = cache.borrow(num_levels * limits.width)
        cache.reserve(end + num_levels)
        self._prepared = self._prepare(cache.index(sequence), num_levels)
        device = model.device.torch_device
        self._sampling = self._sampled(num_levels, sampling, sample_index)
        self._ancestors = torch.empty((1, 0), dtype=torch.int32, device=device)
        self._states = torch.empty((1, 0), device=device)
        self._path = _path(cache, sampling, device)

    def __enter__(self) -> Levels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.give_back(self._slots)

    def _prepare(self, index: int, num_levels: int) -> Tensor:
        """int32 [levels, integers of a bucket's inputs]; tokens and ancestors are still to come."""
        packed = []
        for level in range(num_levels):
            rows = [
                (0, self._end + level, slot, index, self._end, self._cache.nowhere) for slot in self._slots_of(level)
            ]
            own = [[0] * level + [slot] for slot in self._slots_of(level)]
            packed.append(self._inputs.pack(rows, own, self._cache))
        stacked = np.stack(packed) if packed else np.empty((0, 0), dtype=np.int32)
        return torch.from_numpy(stacked).to(self._model.device.torch_device)

    def _sampled(self, num_levels: int, sampling: SamplingParams, sample_index: int) -> SamplingRows:
        """How the text's last row is sampled, and behind it the rows of each level."""
        first = self._end - 1 + self._model.drafted_offset
        positions = [first] + [first + 1 + level for level in range(num_levels) for _ in range(self._width)]
        count = len(positions)
        return SamplingRows.of([sampling] * count, [sample_index] * count, positions, self._model.device.torch_device)

    def _slots_of(self, level: int) -> Sequence[int]:
        return self._slots[level * self._width : (level + 1) * self._width]

    def first(self, computed: Computed) -> Candidates:
        """Candidates behind the last row of a forward."""
        self._states = computed.states[-1:].clone()
        assert computed.logits is not None
        return self._candidates(computed.logits[-1:], 0)

    def expand(self, expansion: Expansion) -> Candidates:
        """Candidates behind each row of a level."""
        count, level = len(expansion.tokens), expansion.level - 1
        above = self._ancestors[expansion.parents]
        inputs = self._inputs
        inputs.packed.copy_(self._prepared[level])
        inputs.tokens[:count] = expansion.tokens.to(torch.int32)
        inputs.ancestors[:count, :level] = above
        if inputs.states.shape[1]:
            inputs.states[:count] = self._states[expansion.parents]
        computed = self._model.replay(self._size, (), has_head=True).part(count)
        self._ancestors = inputs.ancestors[:count, : level + 1].clone()
        self._states = computed.states.clone()
        if self._path is not None:
            self._path = torch.cat((self._path[expansion.parents], expansion.tokens[:, None]), dim=1)
        assert computed.logits is not None
        return self._candidates(computed.logits, 1 + level * self._width)

    def _candidates(self, logits: Tensor, first: int) -> Candidates:
        """first: of these rows, among those that are sampled."""
        rows = part_of(self._sampling, first, first + len(logits))
        path = length = None
        if self._path is not None:
            path = self._path.to(torch.int32)
            length = torch.full((len(path),), path.shape[1], dtype=torch.int32, device=path.device)
        tokens, scores = self._model.device.ops.candidates(
            logits.contiguous(), rows, self._width, path, length, self._model.head_ids
        )
        return Candidates(tokens.to(torch.int64), scores)


def _path(cache: SlotCache, sampling: SamplingParams, device: torch.device) -> Tensor | None:
    """The last provisional row's path for a repetition penalty, int64 [1, length]; None where there is none."""
    if sampling.repetition_penalty == 1.0:
        return None
    return torch.tensor([cache.path_tokens(len(cache.rows) - 1)], dtype=torch.int64).to(device)
