"""A cascade's draft is the intermediate's own text, whoever drafts inside; and it loses no place in it."""

import numpy as np
import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.drafters.cascade import Cascade
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


def other_model(tmp_path, tiny):
    return CpuBackend(tiny.model(tmp_path / "other", tiny.config(num_hidden_layers=1), tiny.Quantized(), seed=8))


def written_alone(model, path, count, sampling, index):
    """The intermediate's own continuation, one token at a time."""
    from deploy.runtime.tree import Draft
    from deploy.runtime.verify import Job, verify

    model.reset(99)
    text, start = list(path), 0
    for _ in range(count):
        (found,) = verify(model, [Job(99, start, text[start:], Draft(), sampling, index)])
        start = len(text)
        text += found.tokens
    model.reset(99)
    return tuple(text[len(path) :])


@pytest.mark.parametrize("inner", [NoDrafter, LookupDrafter])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.9, seed=2)])
def test_its_drafts_are_the_intermediates_own_text(tmp_path, tiny, inner, sampling):
    model = other_model(tmp_path, tiny)
    cascade = Cascade(model, inner(), min_draft_length=5)
    rng = np.random.default_rng(0)
    path = [int(token) for token in rng.integers(0, 263, 12)]
    for _ in range(12):
        draft = cascade.propose(0, path, 30, sampling, 3)
        assert len(draft) >= 5
        assert draft.tokens == written_alone(model, path, len(draft), sampling, 3)
        num_accepted = int(rng.integers(0, len(draft) + 1))  # some whole, some in part
        path += [*draft.tokens[:num_accepted], int(rng.integers(263))]
    cascade.begin(0, 4)
    path = [*path[:4], 7, 8]
    assert cascade.propose(0, path, 3, sampling, 3).tokens == written_alone(model, path, 3, sampling, 3)


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0, top_p=0.95, seed=6)])
def test_answers_are_those_of_plain_decoding(tmp_path, tiny, bundle, is_same, sampling):
    plain, session = Session.open(bundle), Session.open(bundle)
    model = CpuBackend(bundle.model()) if is_same else other_model(tmp_path, tiny)
    session.use(Cascade(model, LookupDrafter(), min_draft_length=4))
    for text in ("Once upon", "abcabcabcabc"):
        prompt = session.encode_raw(text)
        expected = plain.generate(prompt, GenerationOptions(50, sampling))
        found = session.generate(prompt, GenerationOptions(50, sampling))
        assert found.token_ids == expected.token_ids
        if is_same:  # every draft is accepted, at every temperature: the noise is shared
            assert found.speculation.acceptance_by_position[0] == 1.0
            assert found.speculation.rounds <= 2 + len(found.token_ids) // 5


def test_an_interrupt_within_the_intermediate_costs_no_later_draft(tmp_path, tiny, monkeypatch):
    model = other_model(tmp_path, tiny)
    cascade = Cascade(model, LookupDrafter(), min_draft_length=3)
    path = [int(token) for token in np.random.default_rng(0).integers(0, 263, 40)]
    cascade.propose(0, path[:20], 9, SamplingParams(), 0)

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("deploy.runtime.drafters.cascade.verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cascade.propose(0, path, 9, SamplingParams(), 0)
    cascade.begin(0, 2)
    expected = written_alone(model, path[:4], 3, SamplingParams(), 0)
    assert cascade.propose(0, path[:4], 3, SamplingParams(), 0).tokens == expected


def test_cascades_compose(tmp_path, tiny, bundle):
    plain, session = Session.open(bundle), Session.open(bundle)
    inner = Cascade(other_model(tmp_path, tiny), LookupDrafter(), min_draft_length=2)
    session.use(Cascade(CpuBackend(bundle.model()), inner, min_draft_length=6))
    prompt = session.encode_raw("Once upon")
    options = GenerationOptions(40, SamplingParams(1.0, seed=1))
    assert session.generate(prompt, options).token_ids == plain.generate(prompt, options).token_ids


def test_a_draft_length_below_one_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="min_draft_length=0"):
        Cascade(other_model(tmp_path, tiny), NoDrafter(), min_draft_length=0)
