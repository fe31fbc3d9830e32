"""Drafts on the GPU backend, its operations in plain torch: of EAGLE heads and of language models."""

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_record import Owner
from deploy.formats.speculators import EagleDirectory, write_eagle
from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backends import open_head
from deploy.runtime.drafters.base import DraftModel
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_eagle import GpuEagle
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from tests.deploy.runtime.gpu_devices import torch_device

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
    def __init__(self, tiny, folder, tied, choices):
        config = tiny.config(tie_word_embeddings=tied, max_position_embeddings=400)
        self.model = tiny.model(folder / "m", config, tiny.Quantized(), spread=0.4)
        shape = ModelShape.from_config(config)
        tiny.head(folder / "h", shape, OWNER, seed=3, spread=0.12, **choices)
        self.head = EagleDirectory.open(folder / "h", shape)
        self.width = HIDDEN * len(self.head.config.feature_layers)

    def text(self, count, seed=0):
        rng = np.random.default_rng([11, seed])
        features = rng.standard_normal((count, self.width)).astype(np.float32)
        return rng.integers(0, VOCABULARY, count).tolist(), features

    def gpu(self):
        return GpuEagle.open(self.head, GpuBackend.open(self.model, torch_device()))


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny):
    return {name: Case(tiny, tmp_path_factory.mktemp("head"), *case) for name, case in HEADS.items()}


@pytest.fixture(scope="module")
def case(cases):
    return cases["three states"]


def paths(draft):
    """Path → score of every node."""
    found = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
        found.append(((*(found[parent][0] if parent >= 0 else ()), token), score))
    return dict(found)


@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_near_the_references(cases, name):
    """Nearly all nodes are the same, and their scores near: a candidate at the edge may be another one."""
    case = cases[name]
    reference, head = ReferenceEagle(case.head, ReferenceBackend(case.model, activations="bf16")), case.gpu()
    num_same = num_nodes = 0
    for index, (limits, sampling) in enumerate((limits, sampling) for limits in LIMITS for sampling in SAMPLING):
        tokens, features = case.text(1 + index % 13, index)
        expected, found = (
            paths(each.draft(0, tokens, features, limits, sampling, index)) for each in (reference, head)
        )
        same = expected.keys() & found.keys()
        num_same, num_nodes = num_same + len(same), num_nodes + len(expected)
        for path in same:
            assert abs(found[path] - expected[path]) < 0.25
        assert head.length(0) == reference.length(0)
    assert num_same > 0.9 * num_nodes
    assert head.feature_layers == case.head.config.feature_layers
    assert isinstance(head, DraftModel)


@pytest.mark.parametrize("sizes", [(1, 299), (64, 236), (50,) * 6])
def test_a_text_read_in_any_pieces_is_drafted_from_alike(case, sizes):
    tokens, features = case.text(300)
    limits, sampling = TreeLimits(depth=4, width=3, num_nodes=12), SamplingParams(temperature=0.8, seed=2)
    head = case.gpu()
    expected = head.draft(1, tokens, features, limits, sampling)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        found = head.draft(0, tokens[part], features[part], limits, sampling)
        begin += size
    assert found == expected


def test_a_truncated_text_is_drafted_from_as_if_it_had_ended_there(case):
    tokens, features = case.text(40)
    head, limits = case.gpu(), LIMITS[1]
    expected = head.draft(1, tokens[:20], features[:20], limits, SAMPLING[1])
    head.draft(0, tokens, features, limits, SAMPLING[0])
    head.truncate(0, 15)
    assert head.length(0) == 15
    assert head.draft(0, tokens[15:20], features[15:20], limits, SAMPLING[1]) == expected
    head.reset(0)
    assert head.draft(0, tokens[:20], features[:20], limits, SAMPLING[1]) == expected
    with pytest.raises(ValueError, match="truncate to 21 tokens: the sequence has 20"):
        head.truncate(0, 21)


def test_drafted_rows_leave_no_trace_and_their_slots_are_used_again(case):
    head = case.gpu()
    tokens, features = case.text(30)
    expected = head.draft(0, tokens, features, LIMITS[2], SAMPLING[0])
    before = head.cache_bytes
    for _ in range(40):
        head.truncate(0, 29)
        assert head.draft(0, tokens[29:], features[29:], LIMITS[2], SAMPLING[0]) == expected
    assert head.cache_bytes == before


def test_a_draft_at_the_end_of_the_context_has_fewer_levels(case):
    tokens, features = case.text(399)
    draft = case.gpu().draft(0, tokens, features, TreeLimits(depth=5, width=1, num_nodes=5), SAMPLING[0])
    assert len(draft) == 2


def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    tokens, features = case.text(5)
    head = case.gpu()
    expected = head.draft(1, tokens, features, LIMITS[0], SAMPLING[0])
    for bad_tokens, bad_features, message in (
        ([], features[:0], "at least one token"),
        ([1, 2, 3, 4, VOCABULARY], features, r"tokens\[4\]=263 is not in the vocabulary"),
        (tokens, None, r"features are None, expected float32 \[5, 288\]"),
        (tokens, features[:4], r"features are float32 \[4, 288\]"),
        (tokens, features.astype(np.float64), r"features are float64 \[5, 288\]"),
    ):
        with pytest.raises(ValueError, match=message):
            head.draft(0, bad_tokens, bad_features, LIMITS[0], SAMPLING[0])
    assert head.length(0) == 0
    assert head.draft(0, tokens, features, LIMITS[0], SAMPLING[0]) == expected


def test_logits_that_are_not_finite_are_refused_and_change_nothing(case, tmp_path, tiny):
    weights = case.head.weights()
    weights["lm_head.weight"] = np.float32(3e38) * np.sign(weights["lm_head.weight"])
    write_eagle(tmp_path / "h", case.head.config, weights, case.head.draft_ids, OWNER, tiny.training_record())
    target = GpuBackend.open(case.model, torch_device())
    head = GpuEagle.open(EagleDirectory.open(tmp_path / "h", target.shape), target)
    tokens, features = case.text(300)
    for sampling in (SAMPLING[0], SAMPLING[2]):
        with pytest.raises(ValueError, match="the logits for position 301 are not finite"):
            head.draft(0, tokens, features, LIMITS[0], sampling)
        assert head.length(0) == 0


def test_a_head_of_another_size_is_refused(case, tmp_path, tiny):
    path = tiny.model(tmp_path / "n", tiny.config(hidden_size=128), tiny.Quantized())
    with pytest.raises(ValueError, match="hidden_size=96, but the target's is 128"):
        GpuEagle.open(case.head, GpuBackend.open(path, torch_device()))


def test_a_head_is_opened_beside_its_target(case):
    assert isinstance(open_head(case.head, GpuBackend.open(case.model, torch_device())), GpuEagle)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_a_language_models_chain_is_what_it_answers(case, sampling):
    """Its draft of width one, token by token, is its own greedy or sampled continuation."""
    from deploy.runtime.backend import Row

    model = GpuBackend.open(case.model, torch_device())
    tokens, _ = case.text(9)
    draft = model.draft(0, tokens, None, TreeLimits(depth=6, width=1, num_nodes=6), sampling, 5)
    assert (model.length(0), draft.parents) == (9, (-1, 0, 1, 2, 3, 4))
    text = list(tokens)
    model.forward([Row(token, i, 1, i - 1) for i, token in enumerate(text[:-1])], logit_rows=[])
    model.keep(1, range(8))
    for token in draft.tokens:
        (chosen,) = model.forward_tokens([Row(text[-1], len(text) - 1, 1)], sampling, sample_index=5).tokens
        assert chosen == token
        model.keep(1, [0])
        text.append(token)


def test_a_trimmed_language_model_drafts_ids_of_the_target(case):
    ids = np.array([3, 7, 100, 200])
    model = GpuBackend.open(case.model, torch_device(), head_ids=ids)
    tree = model.draft(0, [1, 2], None, TreeLimits(depth=3, width=6, num_nodes=20), SAMPLING[0])
    assert set(tree.tokens) <= set(ids.tolist())
    assert len(tree) == 20


def test_states_stay_on_the_host_in_float32(case):
    """What a drafter reads of the target, whatever the device computes in."""
    target = GpuBackend.open(case.model, torch_device(torch.float16))
    from deploy.runtime.backend import Row

    taps = target.forward([Row(1, 0)], taps=[0, 2]).taps
    assert {values.dtype for values in taps.values()} == {np.dtype(np.float32)}
