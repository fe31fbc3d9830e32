"""Choosing a token from logits: the sampling section of docs/numerics.md, in numpy.

Noise comes from a counter-based generator keyed by seed, sample index, position and token id (Philox4x32-10, Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), added to the processed logits as Gumbel noise; the
largest sum is the sample. The token therefore depends on nothing but its own row: same seed, same text, however the
rows were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.kernels.reference.fp32 import Float32, exp32, log32

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. The defaults choose the most likely one.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: fractions; 1 and 0 keep all. repetition_penalty: 1 is
    none. seed: 0 … 2^64 − 1. Raises ValueError naming the value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature <= 100, "0 (greedy) or 0.001 … 100"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all) to 1"),
            ("repetition_penalty", 1e-2 <= self.repetition_penalty <= 100, "0.01 … 100, 1 for none"),
            ("seed", 0 <= self.seed < 1 << 64, "0 … 2^64 - 1"),
        )
        for name, is_valid, allowed in limits:
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; use {allowed}")


def philox4x32(counters: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters [n, 4] under one key (two 32-bit words): uint32 [n, 4]."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = product0 >> np.uint64(32), product0 & np.uint64(_MASK)
        high1, low1 = product1 >> np.uint64(32), product1 & np.uint64(_MASK)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel_noise(tokens: npt.NDArray[np.int64], *, position: int, sample_index: int, seed: int) -> Float32:
    """Gumbel noise of each token id, float32 [len(tokens)].

    position: of the token to be chosen (its predecessor's plus one). Word token mod 4 of the block with counter
    (token div 4, position, sample_index low, high); u = ((word >> 9) + 0.5)·2^-23, noise −log(−log(u)).
    """
    groups, inverse = np.unique(tokens >> 2, return_inverse=True)
    counters = np.empty((len(groups), 4), dtype=np.uint32)
    counters[:, 0] = groups
    counters[:, 1:] = (position & _MASK, sample_index & _MASK, sample_index >> 32 & _MASK)
    words = philox4x32(counters, (seed & _MASK, seed >> 32))[inverse, tokens & 3]
    uniform = ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -log32(-log32(uniform))


def penalize(logits: Float32, penalty: float, path: Sequence[int]) -> Float32:
    """Divide positive and multiply negative logits of tokens already on the path (CTRL, arXiv 1909.05858)."""
    if penalty == 1.0 or not path:
        return logits
    seen = np.unique(np.asarray(path, dtype=np.int64))
    chosen, factor = logits[seen], np.float32(penalty)
    result = logits.copy()
    result[seen] = np.where(chosen > 0, chosen / factor, chosen * factor)
    return result


def survivors(logits: Float32, params: SamplingParams, path: Sequence[int]) -> tuple[npt.NDArray[np.int64], Float32]:
    """Token ids that penalty, temperature and truncation leave, and their processed logits; likeliest first.

    logits: float32 [vocab]. path: the row's own tokens so far, prompt included. temperature must not be 0.
    """
    z = penalize(logits, params.repetition_penalty, path) / np.float32(params.temperature)
    order = np.argsort(-z, kind="stable")  # ties: the lower id first
    if params.top_k:
        order = order[: params.top_k]
    z = z[order]
    weights = exp32(z - z[0])
    if params.top_p < 1:
        cumulative = np.cumsum(weights, dtype=np.float64)
        count = int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1
        order, z, weights = order[:count], z[:count], weights[:count]
    if params.min_p > 0:
        is_kept = weights >= np.float32(params.min_p)
        order, z = order[is_kept], z[is_kept]
    return order, z


def not_finite(position: int) -> str:
    """Why there is no token for `position`."""
    return f"the logits for position {position} are not finite; the model's weights are not usable"


def not_finite_draft(position: int) -> str:
    """Why there is no draft for `position`."""
    return (
        f"the drafter's logits for position {position} are not finite; its weights are not usable: use a mode without "
        "it (plain, lookup), or make it again"
    )


def sample(
    logits: Float32, params: SamplingParams, *, position: int, path: Sequence[int] = (), sample_index: int = 0
) -> int:
    """The token for `position`, given the logits of the row before it.

    logits: float32 [vocab]. path: the row's own tokens so far, prompt included. sample_index: which of several
    continuations of one prompt. Raises ValueError when the logits are not all finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError(not_finite(position))
    if params.temperature == 0:
        return int(np.argmax(penalize(logits, params.repetition_penalty, path)))
    tokens, z = survivors(logits, params, path)
    score = z + gumbel_noise(tokens, position=position, sample_index=sample_index, seed=params.seed)
    return int(tokens[score == score.max()].min())
