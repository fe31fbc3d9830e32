"""The drafter's trimmed vocabulary (VocabTrim, arXiv 2506.22694; FR-Spec, arXiv 2502.14856).

A drafter's lm_head is most of its cost and few tokens are most of a text: only the most frequent are kept. The target
verifies with its whole vocabulary, so nothing is lost but drafts of rare tokens. How many to keep is a matter of
measurement: MBSU weighs what is accepted against what is read from memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def count_tokens(texts: Iterable[npt.NDArray[np.integer]], vocab_size: int) -> Ids:
    """How often each token occurs: int64 [vocab_size]. texts: token ids [n] each."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in texts:
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def keep_most_frequent(counts: Ids, size: int, end_ids: Sequence[int]) -> Ids:
    """The draft vocabulary: `size` token ids, ascending. Ties go to the lower id.

    counts: int64 [V]. end_ids: tokens that end a text; always kept, or no draft could end one.
    Raises ValueError when `size` does not lie between the number of end tokens and V.
    """
    required = sorted(set(end_ids))
    if not max(1, len(required)) <= size <= len(counts):
        raise ValueError(
            f"draft vocabulary of {size} tokens: must be at least {max(1, len(required))} (the tokens that end a text) "
            f"and at most {len(counts)} (the target's vocabulary)"
        )
    order = np.argsort(-counts, kind="stable")
    order = np.concatenate([np.array(required, np.int64), order[~np.isin(order, required)]])
    return np.sort(order[:size]).astype(np.int64)


def vocabulary_maps(draft_ids: Ids, vocab_size: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """d2t, int64 [D]: target id − draft id; and t2d, bool [V]: whether the draft vocabulary has the token."""
    has_token = np.zeros(vocab_size, dtype=np.bool_)
    has_token[draft_ids] = True
    return draft_ids - np.arange(len(draft_ids)), has_token


def mbsu(tau: float, *, drafter_bytes: int, target_bytes: int, num_drafted: int) -> float:
    """Memory-bound speed-up (FastDraft, arXiv 2411.11055, section 2): τ / (c·γ + 1), c = drafter bytes / target bytes.

    tau: tokens per target call. num_drafted: γ, tokens drafted per call.
    """
    return tau / (drafter_bytes / target_bytes * num_drafted + 1.0)


@dataclass(frozen=True)
class VocabularyChoice:
    """One size of draft vocabulary, and what it is worth."""

    size: int
    tau: float
    drafter_bytes: int
    mbsu: float


def best_choice(choices: Sequence[VocabularyChoice]) -> VocabularyChoice:
    """The size with the highest MBSU; the smaller of equals."""
    return max(choices, key=lambda choice: (choice.mbsu, -choice.size))
