"""CUDA graphs without CUDA: a recording that is run again must find all it reads where it was, and other rows in it."""

import numpy as np
import pytest
import torch

from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_graphs import Computed, Graphs
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from tests.deploy.runtime.gpu_devices import torch_device
from tests.deploy.runtime.rows import VOCABULARY, chain, fill, random_tree


class Recorded:
    """Stands in for a CUDA graph: computes again, into the tensors of the first time, from the addresses of then."""

    def __init__(self, addresses, compute, computed):
        self.addresses, self.compute, self.computed = addresses, compute, computed
        self.first = addresses()
        self.num_replays = 0

    def replay(self):
        assert self.addresses() == self.first
        self.num_replays += 1
        again = self.compute()
        for old, new in zip(tensors(self.computed), tensors(again), strict=True):
            old.copy_(new)


def tensors(computed):
    return [t for t in (computed.states, computed.logits, computed.best, *computed.taps.values()) if t is not None]


@pytest.fixture
def path(tmp_path, tiny):
    return tiny.model(tmp_path / "m", tiny.config("qwen3", max_position_embeddings=1400), tiny.Quantized())


@pytest.fixture
def recording(path, monkeypatch):
    """A backend whose forwards of few rows are recorded, and its recordings."""
    backend, graphs = GpuBackend.open(path, torch_device()), []

    def addresses():
        cache = backend._cache
        return [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, cache.table)]

    def capture(_self, compute):
        computed = compute()
        graphs.append(Recorded(addresses, compute, computed))
        return graphs[-1], computed

    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(backend._graphs, "_is_cuda", True)
    return backend, graphs


def test_forwards_by_recordings_are_those_without(path, recording):
    """Other rows, trees, sequences and taps in the same bucket; outputs that were read are not changed later."""
    (backend, graphs), plain = recording, GpuBackend.open(path, torch_device())
    rng = np.random.default_rng(0)
    for turn in range(12):
        length = int(rng.integers(0, 40))
        context, rows = rng.integers(0, VOCABULARY, length), random_tree(rng, int(rng.integers(1, 7)), length)
        taps = [1, 2] if turn % 3 == 0 else []
        found = []
        for each in (backend, plain):
            fill(each, context, turn % 4)
            found.append(each.forward([type(row)(row.token, row.position, turn % 4, row.parent) for row in rows], taps))
        np.testing.assert_array_equal(found[0].logits, found[1].logits)
        for layer in taps:
            np.testing.assert_array_equal(found[0].taps[layer], found[1].taps[layer])
    assert len(graphs) < sum(graph.num_replays for graph in graphs)


def test_drafts_by_recordings_are_those_without(path, recording):
    (backend, _), plain = recording, GpuBackend.open(path, torch_device())
    limits = TreeLimits(depth=4, width=3, num_nodes=10)
    for sampling in (SamplingParams(), SamplingParams(0.9, repetition_penalty=1.2, seed=2)):
        for tokens in ([3, 4, 5], [6], [7, 8]):
            drafts = [each.draft(0, tokens, None, limits, sampling) for each in (backend, plain)]
            assert drafts[0] == drafts[1]


def test_a_cache_that_has_grown_is_recorded_anew(path, recording):
    """Past the first width of the table and the first slots."""
    (backend, graphs), plain = recording, GpuBackend.open(path, torch_device())
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 1300)
    begin = 0
    for size in (500, 1, 20, 500, 1, 200, 1):
        found = [
            each.forward(chain(tokens[begin : begin + size], begin), logit_rows=[size - 1]) for each in (backend, plain)
        ]
        np.testing.assert_array_equal(found[0].logits, found[1].logits)
        for each in (backend, plain):
            each.keep(0, range(size))
        begin += size
    assert len(graphs) == 4  # of one row three times


def test_without_cuda_nothing_is_recorded():
    computed = Computed(torch.zeros(1, 2), None, None, {})
    assert Graphs(torch.device("cpu")).run("key", 0, lambda: computed) is computed
