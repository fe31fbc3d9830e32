"""The native EAGLE head against the reference: the same drafts, scores to the bit."""

import gc

import numpy as np
import pytest

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_record import Owner
from deploy.formats.speculators import EagleDirectory, write_eagle
from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.cpu_eagle import CpuEagle
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits

VOCABULARY, HIDDEN = 263, 96
OWNER = Owner("c" * 64, {"model.safetensors": "f" * 64}, "a" * 64, "b" * 64)
LIMITS = [
    TreeLimits(depth=4, width=1, num_nodes=4),
    TreeLimits(depth=3, width=3, num_nodes=9),
    TreeLimits(depth=5, width=4, num_nodes=20, min_probability=0.01),
    TreeLimits(depth=6, width=2, num_nodes=7, min_gain=0.05),
]
SAMPLING = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0.8, top_k=6, top_p=0.95, repetition_penalty=1.3, seed=1 << 63),
]
# (target's embedding tied, head)
HEADS = {
    "three states": (True, {"feature_layers": (0, 1, 2), "norm_before_residual": True}),
    "one state, untied": (False, {"feature_layers": (2,), "norm_before_residual": False}),
    "two states, copy": (True, {"feature_layers": (0, 2), "norm_before_residual": False, "embedding": "copy"}),
}


class Case:
    """A head beside its target, and drafts that follow each other as the reference makes them."""

    def __init__(self, tiny, folder, tied, choices):
        config = tiny.config(tie_word_embeddings=tied, max_position_embeddings=400)
        self.model = tiny.model(folder / "m", config, tiny.Quantized(), spread=0.4)
        shape = ModelShape.from_config(config)
        tiny.head(folder / "h", shape, OWNER, seed=3, spread=0.12, **choices)
        self.head = EagleDirectory.open(folder / "h", shape)
        reference, rng = ReferenceEagle(self.head, ReferenceBackend(self.model)), np.random.default_rng(0)
        self.drafts = []
        for index, (limits, sampling) in enumerate((limits, sampling) for limits in LIMITS for sampling in SAMPLING):
            tokens, features = self.text(int(rng.integers(1, 14)), index)
            draft = reference.draft(0, tokens, features, limits, sampling, index)
            self.drafts.append((tokens, features, limits, sampling, index, draft))

    def text(self, count, seed=0):
        rng = np.random.default_rng([11, seed])
        width = HIDDEN * len(self.head.config.feature_layers)
        return rng.integers(0, VOCABULARY, count).tolist(), rng.standard_normal((count, width)).astype(np.float32)

    def native(self, threads=2):
        return CpuEagle(self.head, CpuBackend(self.model, threads=threads))


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny):
    return {name: Case(tiny, tmp_path_factory.mktemp("head"), *case) for name, case in HEADS.items()}


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
    assert head.feature_layers == cases[name].head.config.feature_layers


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


@pytest.mark.parametrize("sizes", [(1, 299), (128, 172), (129, 171), (50,) * 6])
def test_a_text_read_in_any_pieces_is_drafted_from_alike(case, sizes):
    tokens, features = case.text(300)
    limits, sampling = TreeLimits(depth=4, width=3, num_nodes=12), SamplingParams(temperature=0.8, seed=2)
    head = case.native()
    expected = head.draft(1, tokens, features, limits, sampling)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        found = head.draft(0, tokens[part], features[part], limits, sampling)
        begin += size
    assert found == expected


def test_a_truncated_text_is_drafted_from_as_if_it_had_ended_there(case):
    tokens, features = case.text(40)
    head, limits = case.native(), LIMITS[1]
    expected = head.draft(1, tokens[:20], features[:20], limits, SAMPLING[1])
    head.draft(0, tokens, features, limits, SAMPLING[0])
    head.truncate(0, 15)
    assert head.length(0) == 15
    assert head.draft(0, tokens[15:20], features[15:20], limits, SAMPLING[1]) == expected
    head.reset(0)
    assert head.length(0) == 0
    assert head.draft(0, tokens[:20], features[:20], limits, SAMPLING[1]) == expected
    with pytest.raises(ValueError, match="truncate to 21 tokens: the sequence has 20"):
        head.truncate(0, 21)


def test_features_may_lie_anywhere_in_memory(case):
    tokens, features = case.text(9)
    head, limits = case.native(), LIMITS[0]
    expected = head.draft(0, tokens, features, limits, SAMPLING[0])
    assert head.draft(1, tokens, np.asfortranarray(features), limits, SAMPLING[0]) == expected


def test_the_targets_embedding_is_shared_and_outlives_its_name(cases):
    """A head with a copy reads it from its file; neither packs an embedding."""
    sizes = {}
    for name, case in cases.items():
        config = case.head.config
        matrices = [size for key, (_, size) in case.head.contract.items() if len(size) == 2 and "embed" not in key]
        packed = sum(-(-outputs // 32) * 32 * inputs * (1 + 4 / 32) for outputs, inputs in matrices)
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


def test_a_target_with_a_trimmed_head_still_has_its_embedding(case):
    target = CpuBackend(case.model, head_ids=[3, 7, 100])
    head = CpuEagle(case.head, target)
    for tokens, features, limits, sampling, index, draft in case.drafts[:3]:
        assert head.draft(0, tokens, features, limits, sampling, index) == draft


def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    tokens, features = case.text(5)
    wide = np.zeros((5, HIDDEN), np.float32)
    for head in (case.native(), ReferenceEagle(case.head, ReferenceBackend(case.model))):
        expected = head.draft(1, tokens, features, LIMITS[0], SAMPLING[0])
        for bad_tokens, bad_features, message in (
            ([], features[:0], "at least one token"),
            ([1, 2, 3, 4, VOCABULARY], features, r"tokens\[4\]=263 is not in the vocabulary"),
            (tokens, None, r"features are None, expected float32 \[5, 288\]"),
            (tokens, wide, r"features are float32 \[5, 96\], expected float32 \[5, 288\]"),
            (tokens, features[:4], r"features are float32 \[4, 288\]"),
            (tokens, features.astype(np.float64), r"features are float64 \[5, 288\]"),
        ):
            with pytest.raises(ValueError, match=message):
                head.draft(0, bad_tokens, bad_features, LIMITS[0], SAMPLING[0])
        assert head.length(0) == 0
        assert head.draft(0, tokens, features, LIMITS[0], SAMPLING[0]) == expected


def test_logits_that_are_not_finite_are_refused_and_change_nothing(case, tmp_path, tiny):
    """The head's last matrix overflows, here behind a text of several passes."""
    weights = case.head.weights()
    weights["lm_head.weight"] = np.float32(3e38) * np.sign(weights["lm_head.weight"])
    write_eagle(tmp_path / "h", case.head.config, weights, case.head.draft_ids, OWNER, tiny.training_record())
    target = CpuBackend(case.model)
    head = CpuEagle(EagleDirectory.open(tmp_path / "h", target.shape), target)
    tokens, features = case.text(300)
    for sampling in (SAMPLING[0], SAMPLING[2]):
        with pytest.raises(ValueError, match="the logits for position 301 are not finite"):
            head.draft(0, tokens, features, LIMITS[0], sampling)
        assert head.length(0) == 0
        head.truncate(0, 0)


def test_a_head_of_another_size_is_refused(case, tmp_path, tiny):
    other = CpuBackend(tiny.model(tmp_path / "n", tiny.config(hidden_size=128), tiny.Quantized()))
    with pytest.raises(ValueError, match="hidden_size=96, but the target's is 128"):
        CpuEagle(case.head, other)
