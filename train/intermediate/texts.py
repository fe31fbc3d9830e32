"""Plain texts as sequences to learn from: every token but the first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_TOKENS = 16
"""Shorter rests of a document are left out."""


@dataclass(frozen=True)
class TextPart:
    """A run of tokens of one document. token_ids: int32 [n]."""

    token_ids: npt.NDArray[np.int32]

    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """bool [n]: all but the first, which nothing precedes."""
        mask = np.ones(len(self.token_ids), dtype=np.bool_)
        mask[:1] = False
        return mask


def cut_documents(documents: Iterable[Sequence[int]], max_length: int) -> list[TextPart]:
    """Parts of at most `max_length` tokens, none of which spans two documents. documents: token ids each."""
    parts = []
    for document in documents:
        ids = np.asarray(document, dtype=np.int32)
        cut = [ids[begin : begin + max_length] for begin in range(0, len(ids), max_length)]
        parts += [TextPart(part) for part in cut if len(part) >= MIN_TOKENS]
    return parts
