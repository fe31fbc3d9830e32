"""Native sampling, on logits that a caller has: the same tokens and scores as the references choose."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deploy.kernels.cpu.library import Float32, Runtime, Sampling, native, native_failure, pointer
from deploy.runtime.sampling import SamplingParams, not_finite

_ALL = (1 << 63) - 1
"""No vocabulary has more tokens: the largest number that the library takes."""


def native_sampling(params: SamplingParams, sample_index: int) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        top_k=min(params.top_k, _ALL),
        seed=params.seed,
        sample_index=sample_index,
    )


def native_samplings(params: Sequence[SamplingParams], indices: Sequence[int]) -> ctypes.Array[Sampling]:
    """One for each row, with room for one where there is none. Rows in a row often share theirs."""
    found: list[Sampling] = []
    for place, (each, index) in enumerate(zip(params, indices, strict=True)):
        is_last = place > 0 and each is params[place - 1] and index == indices[place - 1]
        found.append(found[-1] if is_last else native_sampling(each, index))
    return (Sampling * max(1, len(found)))(*found)


def sample_native(
    runtime: Runtime,
    logits: Float32,
    params: SamplingParams,
    *,
    position: int,
    path: Sequence[int] = (),
    sample_index: int = 0,
    token_ids: npt.NDArray[np.int64] | None = None,
) -> int:
    """`deploy.runtime.sampling.sample` in native code; token_ids: ascending ids of the logits, None: 0, 1, 2, …"""
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    tokens = np.asarray(path, dtype=np.int32)
    how = native_sampling(params, sample_index)
    ids = None if token_ids is None else np.ascontiguousarray(token_ids, dtype=np.int64)
    token = native().us_sample(
        runtime.handle,
        pointer(logits),
        logits.size,
        ctypes.byref(how),
        pointer(tokens),
        tokens.size,
        position,
        pointer(ids),
    )
    if token == -1:
        raise ValueError(not_finite(position))
    if token < 0:
        raise native_failure()
    return int(token)


def candidates_native(
    runtime: Runtime,
    logits: Float32,
    params: SamplingParams,
    count: int,
    *,
    position: int,
    path: Sequence[int] = (),
    sample_index: int = 0,
    token_ids: npt.NDArray[np.int64] | None = None,
) -> tuple[list[int], list[float]]:
    """`deploy.kernels.reference.candidates.candidates` in native code."""
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    seen = np.asarray(path, dtype=np.int32)
    how = native_sampling(params, sample_index)
    ids = None if token_ids is None else np.ascontiguousarray(token_ids, dtype=np.int64)
    tokens, scores = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
    found = native().us_candidates(
        runtime.handle,
        pointer(logits),
        logits.size,
        ctypes.byref(how),
        pointer(seen),
        seen.size,
        position,
        pointer(ids),
        count,
        pointer(tokens),
        pointer(scores),
    )
    if found == -1:
        raise ValueError(not_finite(position))
    if found < 0:
        raise native_failure()
    return tokens[:found].tolist(), scores[:found].tolist()
