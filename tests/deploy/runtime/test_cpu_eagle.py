"""The native EAGLE head against the reference: the same drafts, scores to the bit.

What every head does is tested in test_eagle.py.
"""

import gc

import numpy as np
import pytest

from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.cpu_eagle import CpuEagle
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from tests.deploy.runtime.heads import HEADS, LIMITS, SAMPLING, Case


class DraftedCase(Case):
    """With drafts that follow each other as the reference makes them."""

    def __init__(self, tiny, folder, name):
        super().__init__(tiny, folder, name)
        reference, rng = ReferenceEagle(self.head, ReferenceBackend(self.model)), np.random.default_rng(0)
        self.drafts = []
        for index, (limits, sampling) in enumerate((limits, sampling) for limits in LIMITS for sampling in SAMPLING):
            tokens, features = self.text(int(rng.integers(1, 14)), index)
            draft = reference.draft(0, tokens, features, limits, sampling, index)
            self.drafts.append((tokens, features, limits, sampling, index, draft))

    def native(self, threads=2):
        return CpuEagle(self.head, CpuBackend(self.model, threads=threads))


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny):
    return {name: DraftedCase(tiny, tmp_path_factory.mktemp("head"), name) for name in HEADS}


@pytest.fixture(scope="module")
def case(cases):
    return cases["three states"]


@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_the_references(isa, cases, name):
    head, length = cases[name].native(), 0
    for tokens, features, limits, sampling, index, draft in cases[name].drafts:
        assert head.draft(0, tokens, features, limits, sampling, index) == draft
        length += len(tokens)
        assert head.length(0) == length
    assert any(parent > 0 for *_, draft in cases[name].drafts for parent in draft.parents)


def test_threads_change_nothing(case):
    for head in (case.native(threads=1), CpuEagle(case.head, CpuBackend(case.model, threads=1), threads=3)):
        for tokens, features, limits, sampling, index, draft in case.drafts:
            assert head.draft(0, tokens, features, limits, sampling, index) == draft


def test_a_long_text_gives_the_references_draft(isa, case):
    tokens, features = case.text(300)
    limits, sampling = TreeLimits(depth=3, width=2, num_nodes=5), SamplingParams()
    reference = ReferenceEagle(case.head, ReferenceBackend(case.model))
    expected = reference.draft(0, tokens, features, limits, sampling)
    assert case.native().draft(0, tokens, features, limits, sampling) == expected


def test_the_targets_embedding_is_shared_and_outlives_its_name(cases):
    """A head with a copy reads it from its file; neither packs an embedding."""
    sizes = {}
    for name, case in cases.items():
        config = case.head.config
        matrices = [size for key, (_, size) in case.head.contract.items() if len(size) == 2 and "embed" not in key]
        packed = sum(-(-outputs // 32) * 32 * inputs * (0.5 + 4 / 32) for outputs, inputs in matrices)
        head = case.native()
        gc.collect()
        assert head.weight_bytes == packed
        tokens, features, limits, sampling, index, draft = case.drafts[1]
        fresh = case.native()
        first, first_features, first_limits, first_sampling, first_index, _ = case.drafts[0]
        fresh.draft(0, first, first_features, first_limits, first_sampling, first_index)
        assert fresh.draft(0, tokens, features, limits, sampling, index) == draft
        assert fresh.cache_bytes == 64 * 2 * config.layer.num_kv_heads * config.layer.head_dim * 2
        sizes[name] = packed
    assert len(set(sizes.values())) == 3


def test_drafts_beside_a_trimmed_target_are_the_references(case):
    target = CpuBackend(case.model, head_ids=[3, 7, 100])
    head = CpuEagle(case.head, target)
    for tokens, features, limits, sampling, index, draft in case.drafts[:3]:
        assert head.draft(0, tokens, features, limits, sampling, index) == draft
