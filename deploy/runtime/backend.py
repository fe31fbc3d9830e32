"""What a backend is: one call over rows of any sequences and trees, and a cache that keeps accepted paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.runtime.sampling import SamplingParams

SEQUENCE_END = -1


@dataclass(frozen=True)
class Row:
    """One token to compute.

    position: absolute, so one more than the parent's. parent: index, within the same call and before this one, of the
    row that it follows; SEQUENCE_END when it follows what the sequence's cache holds.
    """

    token: int
    position: int
    sequence: int = 0
    parent: int = SEQUENCE_END


NO_TOKEN = -1


@dataclass(frozen=True)
class Forward:
    """logits: float32 [rows asked for, vocab]. taps: layer → float32 [rows, hidden], what enters that layer."""

    logits: npt.NDArray[np.float32]
    taps: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class ForwardTokens:
    """tokens: the id chosen after each row asked for, or NO_TOKEN. taps: layer → float32 [rows, hidden]."""

    tokens: list[int]
    taps: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)


class Backend(Protocol):
    """A model that can be run. A row's result never depends on the other rows of a call (docs/numerics.md)."""

    @property
    def shape(self) -> ModelShape: ...

    def forward(
        self, rows: Sequence[Row], taps: Sequence[int] = (), *, logit_rows: Sequence[int] | None = None
    ) -> Forward:
        """Compute `rows`; logits for all of them, or for the indices in `logit_rows`.

        taps: layers whose input is wanted; num_layers is what enters the final norm. The rows stay provisional until
        `keep`; the next forward drops whatever was not kept. Raises ValueError for a row that does not fit.
        """
        ...

    def forward_tokens(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams | Sequence[SamplingParams],
        taps: Sequence[int] = (),
        *,
        token_rows: Sequence[int] | None = None,
        sample_index: int | Sequence[int] = 0,
    ) -> ForwardTokens:
        """Like `forward`, but choose the token that follows each of `token_rows` (default: all).

        The path that a repetition penalty looks at is the row's own: its sequence's cache, its ancestors, itself.
        sampling, sample_index: one for all, or one for each of `token_rows`. A row whose logits are not finite has
        NO_TOKEN: it may be one that was only drafted, and no text's. Raises ValueError as `forward` does.
        """
        ...

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        """Append rows of the last forward, given by index along one path, to the sequence's cache; drop its others."""
        ...

    def length(self, sequence: int) -> int:
        """Tokens in the sequence's cache."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the sequence's tokens from position `length` on. Raises ValueError when it has fewer."""
        ...

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        ...


def check_rows(
    rows: Sequence[Row], shape: ModelShape, lengths: dict[int, int], earlier: Sequence[Row | None] = ()
) -> None:
    """Raise ValueError naming the row that does not fit.

    lengths: sequence → tokens in its cache. earlier: rows of the calls that this one continues, which parents count
    too; None for one that is gone.
    """
    if not rows:
        raise ValueError("forward needs at least one row")
    known = [*earlier, *rows] if earlier else rows
    for index, row in enumerate(rows):
        if not 0 <= row.token < shape.vocab_size:
            raise ValueError(f"rows[{index}].token={row.token} is not in the vocabulary of {shape.vocab_size}")
        if row.parent == SEQUENCE_END:
            expected = lengths.get(row.sequence, 0)
        elif 0 <= row.parent < len(earlier) + index and (parent := known[row.parent]) is not None:
            if parent.sequence != row.sequence:
                raise ValueError(f"rows[{index}].parent={row.parent} belongs to another sequence")
            expected = parent.position + 1
        else:
            raise ValueError(f"rows[{index}].parent={row.parent} is neither an earlier row nor {SEQUENCE_END}")
        if row.position != expected:
            raise ValueError(f"rows[{index}].position={row.position}, but what it follows ends at {expected}")
        if row.position >= shape.context_length:
            raise ValueError(f"rows[{index}].position={row.position} exceeds the context of {shape.context_length}")


def check_outputs(num_rows: int, taps: Sequence[int], logit_rows: Sequence[int] | None, shape: ModelShape) -> None:
    """Raise ValueError unless the layers of `taps` and, of a call of `num_rows`, the rows of `logit_rows` are there."""
    for layer in taps:
        if not 0 <= layer <= shape.num_layers:
            raise ValueError(f"taps={list(taps)}: layer {layer} is not in 0…{shape.num_layers}")
    for index in logit_rows or ():
        if not 0 <= index < num_rows:
            raise ValueError(f"logit_rows={list(logit_rows or ())}: there are {num_rows} rows")


def check_path(sequence: int, path: Sequence[int], rows: Mapping[int, Row]) -> None:
    """Raise ValueError naming the first row of `path` that does not follow the one before it.

    rows: by index, the rows of the sequence that are provisional.
    """
    parent = SEQUENCE_END
    for index in path:
        if index not in rows or rows[index].parent != parent:
            raise ValueError(f"keep: row {index} does not follow row {parent} in the last call's sequence {sequence}")
        parent = index


def check_head_ids(
    head_ids: Sequence[int] | npt.NDArray[np.int64] | None, shape: ModelShape
) -> npt.NDArray[np.int64] | None:
    """As an array, token ids that a head is cut down to; None: it is not. Raises ValueError unless they ascend."""
    if head_ids is None:
        return None
    ids = np.ascontiguousarray(head_ids, dtype=np.int64)
    if not ids.size or ids[0] < 0 or ids[-1] >= shape.vocab_size or (np.diff(ids) <= 0).any():
        raise ValueError(f"head_ids must ascend and lie in 0 … {shape.vocab_size - 1}")
    return ids


def per_row(
    count: int, sampling: SamplingParams | Sequence[SamplingParams], sample_index: int | Sequence[int]
) -> tuple[list[SamplingParams], list[int]]:
    """One entry of each for every row asked for. Raises ValueError when there are more or fewer."""
    params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
    indices = [sample_index] * count if isinstance(sample_index, int) else list(sample_index)
    if len(params) != count or len(indices) != count:
        raise ValueError(
            f"{count} rows need as many entries of sampling and sample_index, got {len(params)} and {len(indices)}"
        )
    return params, indices


def check_truncation(length: int, cached: int) -> None:
    """Raise ValueError unless 0 ≤ length ≤ cached."""
    if not 0 <= length <= cached:
        raise ValueError(f"truncate to {length} tokens: the sequence has {cached}")
