"""The key/value cache of the reference: per sequence, kept tokens followed by the provisional rows of the last call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.runtime.backend import SEQUENCE_END, Row, check_truncation


class SequenceCache:
    """keys, values: float16 [layers, slots, kv_heads, head_dim]; slots below `length` are kept, in position order."""

    def __init__(self, shape: ModelShape) -> None:
        size = (shape.num_layers, 0, shape.num_kv_heads, shape.head_dim)
        self.keys: npt.NDArray[np.float16] = np.zeros(size, dtype=np.float16)
        self.values: npt.NDArray[np.float16] = np.zeros(size, dtype=np.float16)
        self.tokens: list[int] = []
        self.paths: dict[int, list[int]] = {}  # row index in the call → slots of its path, itself included

    @property
    def length(self) -> int:
        return len(self.tokens)

    def path_tokens(self, index: int, rows: Sequence[Row]) -> list[int]:
        """Tokens of the path of row `index` of the last call: what is kept, its ancestors, itself."""
        ancestors = []
        while index != SEQUENCE_END:
            ancestors.append(rows[index].token)
            index = rows[index].parent
        return [*self.tokens, *reversed(ancestors)]

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on, provisional rows included."""
        check_truncation(length, self.length)
        del self.tokens[length:]
        self.paths = {}

    def begin(self, rows: Sequence[Row], sequence: int) -> None:
        """Drop provisional rows and lay out those of a new call."""
        self.paths = {}
        for index, row in enumerate(rows):
            if row.sequence != sequence:
                continue
            slot = self.length + len(self.paths)
            before = list(range(self.length)) if row.parent == SEQUENCE_END else self.paths[row.parent]
            self.paths[index] = [*before, slot]
        self._grow(self.length + len(self.paths))

    def _grow(self, slots: int) -> None:
        if slots <= self.keys.shape[1]:
            return
        extra = max(slots, 2 * self.keys.shape[1]) - self.keys.shape[1]
        padding = ((0, 0), (0, extra), (0, 0), (0, 0))
        self.keys, self.values = np.pad(self.keys, padding), np.pad(self.values, padding)

    def keep(self, path: Sequence[int], rows: Sequence[Row]) -> None:
        """Make the rows of `path` (indices of the last call) the sequence's next tokens and drop the other rows.

        They must follow each other, see `check_path`.
        """
        slots = [self.paths[index][-1] for index in path]
        end = self.length + len(slots)
        self.keys[:, self.length : end] = self.keys[:, slots]
        self.values[:, self.length : end] = self.values[:, slots]
        self.tokens += [rows[index].token for index in path]
        self.paths = {}
