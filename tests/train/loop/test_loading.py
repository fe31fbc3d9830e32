"""Batches of each process, their features, and what is prepared ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.train.loop.tiny import texts
from train.loop.batches import BatchPlan, Position
from train.loop.loading import FeatureCache, load_batches, prefetched

LAYERS, HIDDEN = (2, 5), 3
BYTES_PER_TOKEN = len(LAYERS) * HIDDEN * 2


class Source:
    """Features that show which token of which text they belong to."""

    layers = LAYERS

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def capture(self, sequences: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.float32]]:
        self.asked.append([len(ids) for ids in sequences])
        scale = np.arange(1, 1 + len(LAYERS) * HIDDEN, dtype=np.float32).reshape(len(LAYERS), HIDDEN)
        return [(np.cumsum(ids)[:, None, None] * scale).astype(np.float32) for ids in sequences]


@pytest.fixture
def plan() -> BatchPlan:
    return BatchPlan(texts(23, seed=4), tokens_per_batch=60, max_length=30, seed=0)


def test_the_processes_share_out_each_steps_batches(plan: BatchPlan) -> None:
    steps = list(islice(plan.steps(Position(), 4), 3))
    alone = [batch.token_ids.tolist() for batch in load_batches(plan, steps, rank=0, num_processes=1, cache=None)]
    pair = [
        [batch.token_ids.tolist() for batch in load_batches(plan, steps, rank=rank, num_processes=2, cache=None)]
        for rank in range(2)
    ]
    assert pair == [alone[0::2], alone[1::2]]
    assert len(pair[0]) == len(pair[1]) == 6


@pytest.mark.parametrize("capacity", [0, 100 * BYTES_PER_TOKEN, 10**6])
def test_features_lie_beside_their_tokens_cached_or_not(plan: BatchPlan, capacity: int) -> None:
    cache = FeatureCache(Source(), plan, capacity)
    steps = list(islice(plan.steps(Position(), 1), 30))
    for batch in load_batches(plan, steps, rank=0, num_processes=1, cache=cache):
        ids = batch.token_ids.numpy().astype(np.int32)
        bounds = zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)
        expected = np.concatenate(Source().capture([ids[start:end] for start, end in bounds]))
        assert batch.features is not None
        assert torch.equal(batch.features, torch.from_numpy(expected).bfloat16().float())
    assert cache.num_bytes <= capacity


def test_a_cache_that_is_large_enough_captures_every_text_once(plan: BatchPlan) -> None:
    source = Source()
    cache = FeatureCache(source, plan, 10**6)
    list(load_batches(plan, islice(plan.steps(Position(), 1), 30), rank=0, num_processes=1, cache=cache))
    assert sum(len(lengths) for lengths in source.asked) == 23


def test_a_small_cache_keeps_what_it_has_and_captures_the_rest_every_epoch(plan: BatchPlan) -> None:
    source = Source()
    cache = FeatureCache(source, plan, 100 * BYTES_PER_TOKEN)
    everything = list(range(23))
    for _ in range(3):
        cache.features(everything)
    assert cache.num_bytes > 70 * BYTES_PER_TOKEN
    assert len(source.asked[0]) == 23
    assert 0 < len(source.asked[1]) < 23
    assert source.asked[1] == source.asked[2]


def test_items_are_prepared_in_order_and_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    ready = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            ready.release()
            yield item

    with closing(prefetched(items(), ahead=2)) as stream:
        assert next(stream) == 0
        for _ in range(3):  # the first, and the two ahead
            assert ready.acquire(timeout=10)
        assert made == [0, 1, 2]
        assert [next(stream) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert len(made) <= 5 + 1 + 2
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_while_preparing_an_item_is_raised_where_the_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the capture failed")

    with closing(prefetched(items(), ahead=2)) as stream:
        assert next(stream) == 1
        with pytest.raises(ValueError, match="the capture failed"):
            next(stream)
