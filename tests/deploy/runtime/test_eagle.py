"""What every EAGLE head promises (deploy/runtime/drafters/base.py), beside a target in native code or on the GPU's
operations in plain torch. How near each is to the reference is tested in test_cpu_eagle.py and test_gpu_eagle.py."""

import numpy as np
import pytest

from deploy.formats.speculators import EagleDirectory, write_eagle
from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backends import open_head
from deploy.runtime.drafters.base import DraftModel
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from tests.deploy.runtime.heads import HEADS, HIDDEN, LIMITS, OWNER, SAMPLING, Case
from tests.deploy.runtime.rows import VOCABULARY


@pytest.fixture(scope="module")
def case(tmp_path_factory, tiny):
    return Case(tiny, tmp_path_factory.mktemp("head"), "three states")


@pytest.fixture
def head(open_model, case):
    return open_head(case.head, open_model(case.model))


@pytest.mark.parametrize("name", HEADS)
def test_it_is_a_draft_model_of_its_states(open_model, tmp_path, tiny, name):
    case = Case(tiny, tmp_path, name)
    head = open_head(case.head, open_model(case.model))
    assert isinstance(head, DraftModel)
    assert head.feature_layers == case.head.config.feature_layers


@pytest.mark.parametrize("sizes", [(1, 299), (64, 236), (128, 172), (129, 171), (50,) * 6])
def test_a_text_read_in_any_pieces_is_drafted_from_alike(head, case, sizes):
    tokens, features = case.text(300)
    limits, sampling = TreeLimits(depth=4, width=3, num_nodes=12), SamplingParams(temperature=0.8, seed=2)
    expected = head.draft(1, tokens, features, limits, sampling)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        found = head.draft(0, tokens[part], features[part], limits, sampling)
        begin += size
    assert found == expected


def test_a_truncated_text_is_drafted_from_as_if_it_had_ended_there(head, case):
    tokens, features = case.text(40)
    limits = LIMITS[1]
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


def test_drafted_rows_leave_no_trace_and_no_memory(head, case):
    tokens, features = case.text(30)
    expected = head.draft(0, tokens, features, LIMITS[2], SAMPLING[0])
    before = head.cache_bytes
    for _ in range(40):
        head.truncate(0, 29)
        assert head.draft(0, tokens[29:], features[29:], LIMITS[2], SAMPLING[0]) == expected
    assert head.cache_bytes == before


def test_a_draft_at_the_end_of_the_context_has_fewer_levels(head, case):
    tokens, features = case.text(399)
    draft = head.draft(0, tokens, features, TreeLimits(depth=5, width=1, num_nodes=5), SAMPLING[0])
    assert len(draft) == 2


def test_features_may_lie_anywhere_in_memory(head, case):
    tokens, features = case.text(9)
    expected = head.draft(0, tokens, features, LIMITS[0], SAMPLING[0])
    assert head.draft(1, tokens, np.asfortranarray(features), LIMITS[0], SAMPLING[0]) == expected


def test_a_target_with_a_trimmed_head_still_has_its_embedding(open_model, head, case):
    beside_trimmed = open_head(case.head, open_model(case.model, head_ids=[3, 7, 100]))
    tokens, features = case.text(9)
    for limits in LIMITS:
        drafts = [each.draft(0, tokens, features, limits, SAMPLING[0]) for each in (head, beside_trimmed)]
        assert drafts[0] == drafts[1]


def assert_what_does_not_fit_is_refused(head, case):
    tokens, features = case.text(5)
    expected = head.draft(1, tokens, features, LIMITS[0], SAMPLING[0])
    for bad_tokens, bad_features, message in (
        ([], features[:0], "at least one token"),
        ([1, 2, 3, 4, VOCABULARY], features, r"tokens\[4\]=263 is not in the vocabulary"),
        (tokens, None, r"features are None, expected float32 \[5, 288\]"),
        (tokens, features[:, :HIDDEN], r"features are float32 \[5, 96\], expected float32 \[5, 288\]"),
        (tokens, features[:4], r"features are float32 \[4, 288\]"),
        (tokens, features.astype(np.float64), r"features are float64 \[5, 288\]"),
    ):
        with pytest.raises(ValueError, match=message):
            head.draft(0, bad_tokens, bad_features, LIMITS[0], SAMPLING[0])
    assert head.length(0) == 0
    assert head.draft(0, tokens, features, LIMITS[0], SAMPLING[0]) == expected


def test_what_does_not_fit_is_refused_and_changes_nothing(head, case):
    assert_what_does_not_fit_is_refused(head, case)


def test_what_does_not_fit_is_refused_by_the_reference_alike(case):
    assert_what_does_not_fit_is_refused(ReferenceEagle(case.head, ReferenceBackend(case.model)), case)


def test_logits_that_are_not_finite_are_refused_and_change_nothing(open_model, case, tmp_path, tiny):
    """The head's last matrix overflows, here behind a text of several passes."""
    weights = case.head.weights()
    weights["lm_head.weight"] = np.float32(6e4) * np.sign(weights["lm_head.weight"])
    weights["norm.weight"] = np.full_like(weights["norm.weight"], 1e37)
    write_eagle(tmp_path / "h", case.head.config, weights, case.head.draft_ids, OWNER, tiny.training_record())
    target = open_model(case.model)
    head = open_head(EagleDirectory.open(tmp_path / "h", target.shape), target)
    tokens, features = case.text(300)
    for sampling in (SAMPLING[0], SAMPLING[2]):
        with pytest.raises(
            ValueError, match=r"the drafter's logits for position 301 are not finite.*use a mode without"
        ):
            head.draft(0, tokens, features, LIMITS[0], sampling)
        assert head.length(0) == 0
        head.truncate(0, 0)


def test_a_head_of_another_size_is_refused(open_model, case, tmp_path, tiny):
    other = open_model(tiny.model(tmp_path / "n", tiny.config(hidden_size=128), tiny.Quantized()))
    with pytest.raises(ValueError, match="hidden_size=96, but the target's is 128"):
        open_head(case.head, other)
