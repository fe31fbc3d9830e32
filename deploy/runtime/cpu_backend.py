"""`CpuBackend`: the `int8` form of docs/numerics.md in native code, one call per forward."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.cpu.library import Call, Float32, Sampling, address, native, pointer, require, shared_runtime
from deploy.runtime.backend import (
    Forward,
    ForwardTokens,
    Row,
    check_head_ids,
    check_outputs,
    check_path,
    check_rows,
    per_row,
)
from deploy.runtime.cpu_loader import GROUP, check_shape, load_language_model
from deploy.runtime.cpu_model import CpuModel
from deploy.runtime.cpu_sampling import native_samplings
from deploy.runtime.sampling import SamplingParams


class CpuBackend(CpuModel):
    """Backend (see deploy/runtime/backend.py) in native code: the same bits as ReferenceBackend's `int8` form.

    It is a DraftModel too (deploy/runtime/drafters/base.py).

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
        opened = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
        shape = opened.shape
        ids = check_head_ids(head_ids, shape)
        check_shape(shape)
        has_lookup_matrix = shape.tied_embeddings and ids is not None  # otherwise it is the head's, or the file's
        self._lookup_bytes = has_lookup_matrix * shape.vocab_size * shape.hidden_size * (GROUP + 4) // GROUP
        self._num_logits = shape.vocab_size if ids is None else len(ids)
        runtime = shared_runtime(threads)
        super().__init__(load_language_model(opened, runtime, ids), shape, runtime)

    @property
    def read_bytes(self) -> int:
        return self.weight_bytes - self._lookup_bytes

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """A language model drafts from the text alone."""
        return ()

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        first = self._provisional.get(sequence, len(self._rows))
        provisional = enumerate(self._rows[first:], first)
        check_path(sequence, path, {index: row for index, row in provisional if row.sequence == sequence})
        if sequence not in self._lengths:
            return
        rows = array("i", path)
        require(native().us_model_keep(self.handle, sequence, address(rows), len(rows)))
        self._lengths[sequence] += len(rows)
        self._provisional.pop(sequence, None)

    def forward(
        self,
        rows: Sequence[Row],
        taps: Sequence[int] = (),
        *,
        logit_rows: Sequence[int] | None = None,
        continues: bool = False,
    ) -> Forward:
        """As of a Backend. continues: the rows of the calls before stay, and these come behind them.

        Parents, and the rows that `keep` is given, are then indices into all of those; `logit_rows` counts this call's.
        """
        self._check(rows, taps, logit_rows, continues)
        num_logits = len(rows) if logit_rows is None else len(logit_rows)
        logits = np.empty((num_logits, self._num_logits), dtype=np.float32)
        tapped = self._run(rows, taps, logit_rows, continues, logits=logits)
        return Forward(logits, tapped)

    def forward_tokens(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams | Sequence[SamplingParams],
        taps: Sequence[int] = (),
        *,
        token_rows: Sequence[int] | None = None,
        sample_index: int | Sequence[int] = 0,
        continues: bool = False,
        logits: Float32 | None = None,
    ) -> ForwardTokens:
        """As of a Backend; the tokens are chosen natively. continues: as of `forward`.

        logits: an array [rows asked for, the head's tokens] that is filled with what they are chosen from.
        """
        self._check(rows, taps, token_rows, continues)
        wanted = range(len(rows)) if token_rows is None else token_rows
        params, indices = per_row(len(wanted), sampling, sample_index)
        if logits is not None and (logits.dtype != np.float32 or logits.shape != (len(wanted), self._num_logits)):
            raise ValueError(
                f"logits is {logits.dtype} {logits.shape}; it must be float32 {(len(wanted), self._num_logits)}"
            )
        how = native_samplings(params, indices)
        chosen = array("q", bytes(8 * max(1, len(wanted))))
        tapped = self._run(rows, taps, token_rows, continues, logits=logits, how=how, chosen=chosen)
        return ForwardTokens(chosen[: len(wanted)].tolist(), tapped)

    def _check(
        self, rows: Sequence[Row], taps: Sequence[int], chosen_rows: Sequence[int] | None, continues: bool
    ) -> None:
        earlier: list[Row | None] = []
        if continues:
            gone = len(self._rows)
            earlier += [
                row if self._provisional.get(row.sequence, gone) <= i else None for i, row in enumerate(self._rows)
            ]
        check_rows(rows, self._shape, self._lengths, earlier)
        check_outputs(len(rows), taps, chosen_rows, self._shape)

    def _run(
        self,
        rows: Sequence[Row],
        taps: Sequence[int],
        head_rows: Sequence[int] | None,
        continues: bool,
        *,
        logits: Float32 | None = None,
        how: ctypes.Array[Sampling] | None = None,
        chosen: array[int] | None = None,
    ) -> dict[int, Float32]:
        count = len(rows)
        tokens = array("i", [row.token for row in rows])
        positions = array("i", [row.position for row in rows])
        parents = array("i", [row.parent for row in rows])
        sequences = array("q", [row.sequence for row in rows])
        heads = array("q", range(count) if head_rows is None else head_rows)
        layers = array("i", sorted(set(taps)))
        tapped = np.empty((len(layers), count, self._shape.hidden_size), dtype=np.float32) if layers else None
        self._grow_rope(max(positions) + 1)
        call = Call(
            num_rows=count,
            tokens=address(tokens),
            positions=address(positions),
            parents=address(parents),
            sequences=address(sequences),
            num_taps=len(layers),
            tap_layers=address(layers),
            taps=pointer(tapped),
            num_head_rows=len(heads),
            head_rows=address(heads),
            logits=pointer(logits),
            sampling=None if how is None else ctypes.addressof(how),
            chosen=None if chosen is None else address(chosen),
            continues=continues,
        )
        if not continues:
            self._forget_rows()
        first = len(self._rows)
        self._rows += rows
        for sequence in set(sequences):
            self._provisional.setdefault(sequence, first)
            self._lengths.setdefault(sequence, 0)
        require(native().us_model_forward(self.handle, ctypes.byref(call)))
        return {} if tapped is None else dict(zip(layers, tapped, strict=True))
