"""What a backend is: one call over rows of any sequences and trees, and a cache that keeps accepted paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape

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


@dataclass(frozen=True)
class Forward:
    """logits: float32 [rows asked for, vocab]. taps: layer → float32 [rows, hidden], what enters that layer."""

    logits: npt.NDArray[np.float32]
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

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        """Append rows of the last forward, given by index along one path, to the sequence's cache; drop its others."""
        ...

    def length(self, sequence: int) -> int:
        """Tokens in the sequence's cache."""
        ...

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        ...


def check_rows(rows: Sequence[Row], shape: ModelShape, lengths: dict[int, int]) -> None:
    """Raise ValueError naming the row that does not fit; lengths: sequence → tokens in its cache."""
    if not rows:
        raise ValueError("forward needs at least one row")
    for index, row in enumerate(rows):
        if not 0 <= row.token < shape.vocab_size:
            raise ValueError(f"rows[{index}].token={row.token} is not in the vocabulary of {shape.vocab_size}")
        if row.parent == SEQUENCE_END:
            expected = lengths.get(row.sequence, 0)
        elif 0 <= row.parent < index:
            parent = rows[row.parent]
            if parent.sequence != row.sequence:
                raise ValueError(f"rows[{index}].parent={row.parent} belongs to another sequence")
            expected = parent.position + 1
        else:
            raise ValueError(f"rows[{index}].parent={row.parent} is neither an earlier row nor {SEQUENCE_END}")
        if row.position != expected:
            raise ValueError(f"rows[{index}].position={row.position}, but what it follows ends at {expected}")
        if row.position >= shape.context_length:
            raise ValueError(f"rows[{index}].position={row.position} exceeds the context of {shape.context_length}")
