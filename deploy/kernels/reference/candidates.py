"""The candidates of docs/numerics.md: the best tokens of a row, and logarithms of what they are worth to a drafter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deploy.kernels.reference.fp32 import LANES, Float32, exp32, log32
from deploy.runtime.sampling import SamplingParams, gumbel_noise, not_finite, penalize, survivors

Candidates = tuple[list[int], list[np.float32]]


def sum_exp(values: Float32, largest: np.float32) -> float:
    """Σ exp(values − largest) in float64, in blocks of 16: the four sums of every fourth one, then their sum."""
    weights = exp32(values - largest).astype(np.float64)
    padded = np.zeros(-(-len(weights) // LANES) * LANES)
    padded[: len(weights)] = weights
    lanes = padded.reshape(-1, 4, 4)
    parts = ((lanes[:, 0] + lanes[:, 1]) + lanes[:, 2]) + lanes[:, 3]
    blocks = (parts[:, 0] + parts[:, 1]) + (parts[:, 2] + parts[:, 3])
    return float(np.cumsum(blocks)[-1])


def candidates(
    logits: Float32,
    params: SamplingParams,
    count: int,
    *,
    position: int,
    path: Sequence[int] = (),
    sample_index: int = 0,
    token_ids: npt.NDArray[np.int64] | None = None,
) -> Candidates:
    """The `count` best tokens for `position`, best first, with their scores; fewer where truncation leaves fewer.

    logits: float32 [vocab]. path: the row's own tokens so far. token_ids: ascending ids of the logits, None: 0, 1, …
    The first one is what `sample` chooses. Raises ValueError when the logits are not all finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError(not_finite(position))
    ids = np.arange(len(logits)) if token_ids is None else token_ids
    seen = np.flatnonzero(np.isin(ids, np.array(path, dtype=np.int64))).tolist()
    if params.temperature == 0:
        values = penalize(logits, params.repetition_penalty, seen)
    else:
        columns, z = survivors(logits, params, seen)
        order = np.argsort(columns)
        ids, z = ids[columns[order]], z[order]
        values = z + gumbel_noise(ids, position=position, sample_index=sample_index, seed=params.seed)
    best = np.argsort(-values, kind="stable")[:count]
    largest = values.max()
    total = log32(np.array([sum_exp(values, largest)], dtype=np.float32))[0]
    return ids[best].tolist(), list((values[best] - largest) - total)
