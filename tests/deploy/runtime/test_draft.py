"""Drafts of a language model: in native code the reference's; there and on the GPU backend, nothing else changes."""

import numpy as np
import pytest

from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime import cpu_model
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits
from tests.deploy.runtime import heads
from tests.deploy.runtime.rows import VOCABULARY

LIMITS = [*heads.LIMITS, TreeLimits(depth=2, width=16, num_nodes=64)]
SAMPLING = [*heads.SAMPLING, SamplingParams(temperature=1.2, min_p=0.1, seed=4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    config = tiny.config("qwen3", max_position_embeddings=400)
    return tiny.model(tmp_path_factory.mktemp("model"), config, tiny.Quantized(), spread=0.4)


@pytest.fixture(scope="module")
def expected(directory):
    """(tokens, limits, sampling, sample index) of drafts that follow each other, with the reference's."""
    reference, rng = ReferenceBackend(directory), np.random.default_rng(0)
    drafts = []
    for index, (limits, sampling) in enumerate((limits, sampling) for limits in LIMITS for sampling in SAMPLING):
        tokens = rng.integers(0, VOCABULARY, int(rng.integers(1, 12))).tolist()
        drafts.append((tokens, limits, sampling, index, reference.draft(0, tokens, None, limits, sampling, index)))
    return drafts


def random_tokens(count, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def next_tokens(backend, length, sequence=0):
    """What the model says to three further tokens: of everything that the cache holds."""
    rows = [Row(5 + i, length + i, sequence, i - 1) for i in range(3)]
    return backend.forward(rows).logits


def test_drafts_are_the_references(isa, directory, expected):
    backend, length = CpuBackend(directory, threads=2), 0
    for tokens, limits, sampling, index, draft in expected:
        assert backend.draft(0, tokens, None, limits, sampling, index) == draft
        length += len(tokens)
        assert backend.length(0) == length
    assert max(len(draft) for *_, draft in expected) > 30


def test_threads_change_nothing(directory, expected):
    backends = [CpuBackend(directory, threads=threads) for threads in (1, 3)]
    for tokens, limits, sampling, index, draft in expected:
        for backend in backends:
            assert backend.draft(0, tokens, None, limits, sampling, index) == draft


def test_the_first_candidate_is_what_the_model_chooses(open_model, directory):
    backend, tokens = open_model(directory), random_tokens(20)
    for sampling in SAMPLING:
        backend.reset(0)
        draft = backend.draft(0, tokens, None, TreeLimits(depth=6, width=1, num_nodes=6), sampling, 7)
        assert (backend.length(0), draft.parents) == (20, (-1, 0, 1, 2, 3, 4))
        chosen = draft.tokens
        for place, token in enumerate(chosen):
            row = Row([*tokens, *chosen][19 + place], 19 + place)
            backend.truncate(0, 19 + place)
            assert backend.forward_tokens([row], sampling, sample_index=7).tokens == [token]
            backend.keep(0, [0])


@pytest.mark.parametrize("sizes", [(300,), (1, 299), (128, 172), (129, 171), (50,) * 6])
def test_a_text_read_in_any_pieces_is_drafted_from_alike(open_model, directory, sizes):
    tokens, backend = random_tokens(300), open_model(directory)
    limits, sampling = TreeLimits(depth=4, width=3, num_nodes=12), SamplingParams(temperature=0.8, seed=2)
    backend.forward([Row(token, i, 1, i - 1) for i, token in enumerate(tokens[:-1])], logit_rows=[])
    backend.keep(1, range(299))
    expected = backend.draft(1, tokens[-1:], None, limits, sampling)
    begin = 0
    for size in sizes:
        found = backend.draft(0, tokens[begin : begin + size], None, limits, sampling)
        begin += size
    assert found == expected
    np.testing.assert_array_equal(next_tokens(backend, 300), next_tokens(backend, 300, sequence=1))


def test_drafts_of_several_sequences_do_not_touch_each_other(open_model, directory):
    backend, limits = open_model(directory), TreeLimits(depth=3, width=2, num_nodes=6)
    texts = {0: random_tokens(40, 2), 9: random_tokens(33, 3)}
    alone = {}
    for sequence, tokens in texts.items():
        alone[sequence] = open_model(directory).draft(0, tokens, None, limits, SamplingParams())
    for sequence, tokens in texts.items():
        backend.draft(sequence, tokens[:20], None, limits, SamplingParams())
    for sequence, tokens in texts.items():
        assert backend.draft(sequence, tokens[20:], None, limits, SamplingParams()) == alone[sequence]


def test_a_draft_drops_rows_that_were_not_kept(open_model, directory):
    backend = open_model(directory)
    backend.forward([Row(1, 0), Row(2, 0, 1)])
    backend.draft(0, [3], None, TreeLimits(), SamplingParams())
    for sequence in (0, 1):
        with pytest.raises(ValueError, match="row 0 does not follow"):
            backend.keep(sequence, [0])
    assert backend.forward([Row(4, 1)], continues=True).logits.shape == (1, VOCABULARY)
    backend.keep(0, [0])
    assert backend.length(0) == 2


def test_a_trimmed_vocabulary_drafts_its_own_tokens(open_model, directory):
    ids = np.sort(np.random.default_rng(5).choice(VOCABULARY, 60, replace=False))
    backend = open_model(directory, head_ids=ids)
    found = backend.draft(0, random_tokens(9), None, TreeLimits(depth=3, width=4, num_nodes=30), SamplingParams())
    assert len(found) == 30
    assert set(found.tokens) <= set(ids.tolist())


def test_the_contexts_end_ends_a_draft(open_model, directory):
    """As many levels as rows fit; the last of them needs none."""
    backend, reference = open_model(directory), ReferenceBackend(directory)
    tokens = random_tokens(400)
    backend.draft(0, tokens[:398], None, TreeLimits(depth=1), SamplingParams())
    assert len(backend.draft(0, tokens[398:399], None, TreeLimits(), SamplingParams())) == 2
    assert len(backend.draft(0, tokens[399:], None, TreeLimits(), SamplingParams())) == 1
    for model in (backend, reference):
        with pytest.raises(ValueError, match=r"\d+ \+ 401 tokens exceed the context of 400"):
            model.reset(0)
            model.draft(0, [*tokens, 1], None, TreeLimits(), SamplingParams())
        assert model.length(0) == 0


@pytest.mark.parametrize(
    ("tokens", "features", "message"),
    [
        ([], None, "at least one token"),
        ([VOCABULARY], None, r"tokens\[0\]=263 is not in the vocabulary"),
        ([1, -1], None, r"tokens\[1\]=-1 is not in the vocabulary"),
        ([1], np.zeros((1, 96), np.float32), "expected None"),
    ],
)
def test_what_does_not_fit_is_refused(open_model, directory, tokens, features, message):
    for model in (open_model(directory), ReferenceBackend(directory)):
        model.draft(0, [1, 2], None, TreeLimits(), SamplingParams())
        with pytest.raises(ValueError, match=message):
            model.draft(0, tokens, features, TreeLimits(), SamplingParams())
        assert model.length(0) == 2
        assert model.feature_layers == ()


def test_an_empty_draft_is_possible(open_model, directory):
    backend = open_model(directory)
    limits = TreeLimits(depth=4, width=2, min_probability=0.999)
    assert backend.draft(0, [1, 2], None, limits, SamplingParams(temperature=100.0)) == Draft()
    assert backend.length(0) == 2


def test_an_interrupt_that_comes_as_a_draft_ends_leaves_the_model_usable(directory, monkeypatch):
    """Python delivers a Ctrl-C between the native call and the next line."""
    backend, calm = CpuBackend(directory), CpuBackend(directory)
    limits, tokens = TreeLimits(2, 1, 2), random_tokens(30)
    library = cpu_model.native()

    class Interrupted:
        def __getattr__(self, name):
            return getattr(library, name)

        def us_model_draft(self, *arguments):
            library.us_model_draft(*arguments)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cpu_model, "native", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.draft(0, tokens, None, limits, SamplingParams())
    assert backend.length(0) == 30
    backend.truncate(0, 10)
    calm.draft(0, tokens[:10], None, limits, SamplingParams())
    again, expected = (each.draft(0, tokens[10:], None, limits, SamplingParams()) for each in (backend, calm))
    assert again == expected
