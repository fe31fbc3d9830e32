"""Batches with the target's hidden states, captured for the step that needs them, or ahead of it in the background.

States are rounded to bfloat16, which halves what a cache of them takes, whether they were captured anew or held: so a
resumed run, whose cache is empty, sees the same bits.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.features import FeatureSource
from train.loop.batches import Batch, BatchPlan, StepPlan

Item = TypeVar("Item")


class FeatureCache:
    """Features of the sequences seen first, up to `capacity_bytes`; the others are captured every time.

    Nothing is evicted: every epoch visits every sequence once, and in that pattern the most recently used are the
    worst to keep.
    """

    def __init__(self, source: FeatureSource, plan: BatchPlan, capacity_bytes: int) -> None:
        self._source, self._plan = source, plan
        self._capacity_bytes = capacity_bytes
        self._held: dict[int, Tensor] = {}
        self.num_bytes = 0

    def features(self, indices: Sequence[int]) -> list[Tensor]:
        """bfloat16 [n, L, H] of each sequence; one capture for all that are not held."""
        missing = [index for index in indices if index not in self._held]
        captured: dict[int, Tensor] = {}
        if missing:
            found = self._source.capture([self._plan.token_ids(index) for index in missing])
            captured = {index: _rounded(features) for index, features in zip(missing, found, strict=True)}
        for index, features in captured.items():
            assert len(features) == len(self._plan.token_ids(index))
            if self.num_bytes + features.nbytes <= self._capacity_bytes:
                self._held[index] = features
                self.num_bytes += features.nbytes
        return [self._held[index] if index in self._held else captured[index] for index in indices]


def _rounded(features: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(features).to(torch.bfloat16)


def load_batches(
    plan: BatchPlan, steps: Iterable[StepPlan], *, rank: int, num_processes: int, cache: FeatureCache | None
) -> Generator[Batch, None, None]:
    """The batches of process `rank`: of every step's batches, each `num_processes`-th."""
    for step in steps:
        for indices in step.batches[rank::num_processes]:
            batch = plan.batch(indices)
            if cache is not None:
                batch = replace(batch, features=torch.cat(cache.features(indices)).float())
            yield batch


def prefetched(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
    """The endless `items`, computed in one background thread up to `ahead` before they are asked for.

    An error in the thread is raised where its item is asked for. Closing the iterator waits for the item in the making.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = deque(pool.submit(next, items) for _ in range(ahead))
        while True:
            item = pending.popleft().result()
            pending.append(pool.submit(next, items))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
