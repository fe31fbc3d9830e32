"""`GpuBackend`: the `bf16` form of docs/numerics.md by Triton kernels, one CUDA graph per forward of few rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deploy.formats.architectures import ModelShape
from deploy.formats.model_dir import ModelDirectory
from deploy.runtime.backend import Forward, ForwardTokens, Row, check_head_ids, check_outputs, check_rows, per_row
from deploy.runtime.gpu_forward import Stream, check_shape, run_layers, write_chain
from deploy.runtime.gpu_graphs import Computed
from deploy.runtime.gpu_inputs import RowInputs
from deploy.runtime.gpu_loader import load_language_model, too_large
from deploy.runtime.gpu_model import ROWS_AT_ONCE, Device, Float32, GpuModel
from deploy.runtime.gpu_sampling import Choice, choose
from deploy.runtime.gpu_weights import LanguageModel
from deploy.runtime.sampling import SamplingParams


class GpuBackend(GpuModel):
    """Backend (see deploy/runtime/backend.py) and DraftModel (deploy/runtime/drafters/base.py) on a device.

    A row's result does not depend on its bucket nor on the rows beside it; from the reference's `bf16` form it differs
    within the tolerance of docs/numerics.md. weights: on the device.
    """

    def __init__(self, shape: ModelShape, weights: LanguageModel, device: Device) -> None:
        super().__init__(device, shape, weights, weights.head_ids)
        self.weights = weights

    @classmethod
    def open(
        cls,
        directory: ModelDirectory | str | Path,
        device: Device,
        *,
        head_ids: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> GpuBackend:
        """A model of a directory. head_ids: as of CpuBackend. Raises ValueError for what is not supported."""
        opened = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
        shape = opened.shape
        ids = check_head_ids(head_ids, shape)
        check_shape(shape)
        try:
            weights = load_language_model(opened, device.torch_device, device.dtype, ids)
        except torch.OutOfMemoryError as error:
            raise MemoryError(too_large(opened.path)) from error
        return cls(shape, weights, device)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """A language model drafts from the text alone."""
        return ()

    @property
    def drafted_offset(self) -> int:
        return 1

    def read_states(self, features: Float32) -> Tensor:
        raise AssertionError("a language model reads no states")

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        self._cache.keep(sequence, path)

    def forward(
        self,
        rows: Sequence[Row],
        taps: Sequence[int] = (),
        *,
        logit_rows: Sequence[int] | None = None,
        continues: bool = False,
    ) -> Forward:
        """As of a Backend. continues: as of CpuBackend."""
        self._check(rows, taps, logit_rows, continues)
        logits, _, tapped = self._run(rows, taps, logit_rows, continues)
        return Forward(logits.cpu().numpy(), tapped)

    def forward_tokens(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams | Sequence[SamplingParams],
        taps: Sequence[int] = (),
        *,
        token_rows: Sequence[int] | None = None,
        sample_index: int | Sequence[int] = 0,
        continues: bool = False,
    ) -> ForwardTokens:
        """As of a Backend; what leaves the device of each row is its token. continues: as of `forward`."""
        self._check(rows, taps, token_rows, continues)
        wanted = list(range(len(rows))) if token_rows is None else list(token_rows)
        params, indices = per_row(len(wanted), sampling, sample_index)
        first = len(self._cache.rows) if continues else 0
        logits, best, tapped = self._run(rows, taps, token_rows, continues)
        choices = [
            Choice(how, index, rows[row].position + 1, self._path(first + row, how))
            for row, how, index in zip(wanted, params, indices, strict=True)
        ]
        return ForwardTokens(choose(self.device.ops, logits, best, choices, self.head_ids), tapped)

    def _path(self, row: int, how: SamplingParams) -> Sequence[int]:
        """The row's own path, where a penalty looks at it."""
        return self._cache.path_tokens(row) if how.repetition_penalty != 1.0 else ()

    def _check(
        self, rows: Sequence[Row], taps: Sequence[int], chosen_rows: Sequence[int] | None, continues: bool
    ) -> None:
        check_rows(rows, self._shape, self._cache.lengths(), self._cache.earlier() if continues else ())
        check_outputs(len(rows), taps, chosen_rows, self._shape)

    def _run(
        self, rows: Sequence[Row], taps: Sequence[int], head_rows: Sequence[int] | None, continues: bool
    ) -> tuple[Tensor, Tensor, dict[int, Float32]]:
        """Logits and greedy tokens of the rows asked for, on the device; states of all rows, on the host."""
        places = self._cache.begin(rows, continues=continues)
        self._cache.write_table()
        wanted = range(len(rows)) if head_rows is None else head_rows
        layers = tuple(sorted(set(taps)))
        parts: list[tuple[Tensor, Tensor]] = []
        tapped: list[Float32] = []
        order: list[int] = []  # of `wanted`, as their logits come
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, len(rows))
            places_here = [place for place, row in enumerate(wanted) if begin <= row < end]
            local = [wanted[place] - begin for place in places_here]
            computed = self._compute(rows[begin:end], places[begin:end], layers, local)
            order += places_here
            if computed.logits is not None and computed.best is not None:
                parts.append((computed.logits, computed.best))
            if layers:
                tapped.append(torch.stack([computed.taps[layer] for layer in layers]).cpu().numpy())
        states = np.concatenate(tapped, axis=1) if tapped else ()
        return *self._in_order(parts, order), dict(zip(layers, states, strict=True))

    def _in_order(self, parts: list[tuple[Tensor, Tensor]], order: list[int]) -> tuple[Tensor, Tensor]:
        if not parts:
            width = self.weights.head.weight.shape[0]
            device = self.device.torch_device
            return torch.empty((0, width), device=device), torch.empty(0, dtype=torch.int32, device=device)
        logits, best = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
        if order == sorted(order):
            return logits, best
        back = torch.tensor(np.argsort(order)).to(self.device.torch_device)
        return logits[back], best[back]

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding, fp32 [len(tokens), hidden]."""
        return self.device.ops.embedding(tokens, self.weights.embedding)

    def _forward(
        self, inputs: RowInputs, taps: tuple[int, ...], head_rows: Tensor | None, *, has_head: bool
    ) -> Computed:
        write_chain(self._cache, inputs)
        stream = Stream(self.embed(inputs.tokens))
        run_layers(self._context, self.weights.layers, inputs, stream, taps)
        normed = stream.norm(self._context, self.weights.norm, self.device.dtype)
        stream.tap(self._shape.num_layers, taps)
        if not has_head:
            return Computed(stream.residual, None, None, stream.taps)
        asked = normed if head_rows is None else normed[head_rows]
        return Computed(stream.residual, *self.head(asked, self.weights.head), stream.taps)
