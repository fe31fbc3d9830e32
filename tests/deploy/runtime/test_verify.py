"""Whatever is drafted, what comes out is what the model alone would have written."""

import numpy as np
import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.backend import NO_TOKEN, ForwardTokens
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from deploy.runtime.tree import ROOT, Draft, TreeLimits
from deploy.runtime.verify import Job, verify

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(0.7, seed=3),
    SamplingParams(1.0, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=9),
    SamplingParams(1.5, top_k=20, seed=4),
]


class RandomDrafter:
    """Random trees, some of whose branches follow the text that will come. taps: states that it demands and checks."""

    def __init__(self, texts, vocab_size, seed, taps=()):
        self.texts, self.vocab_size, self.taps = texts, vocab_size, taps
        self.rng = np.random.default_rng(seed)
        self.committed = {}

    def begin(self, sequence, length):
        back = int(self.rng.integers(0, 2)) if length else 0  # a drafter may want tokens again
        self.committed[sequence] = self.committed.get(sequence, [])[: length - back]
        return length - back

    def commit(self, sequence, tokens, features):
        if self.taps:
            assert features.shape[0] == len(tokens)
        self.committed.setdefault(sequence, []).extend(tokens)

    def propose(self, sequence, path, budget, sampling, sample_index):
        assert self.committed[sequence] == list(path[:-1])
        text = next((text for text in self.texts if text[: len(path)] == list(path)), list(path))
        tokens, parents, depths = [], [], []
        for _ in range(int(self.rng.integers(0, 9))):
            parent = int(self.rng.integers(-1, len(tokens)))
            depth = 1 if parent == ROOT else depths[parent] + 1
            if depth > budget:
                continue
            place = len(path) + depth - 1
            is_right = self.rng.random() < 0.7 and place < len(text)
            token = text[place] if is_right else int(self.rng.integers(self.vocab_size))
            tokens.append(token), parents.append(parent), depths.append(depth)
        return Draft(tuple(tokens), tuple(parents))

    def reset(self, sequence):
        self.committed.pop(sequence, None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


@pytest.fixture(scope="module", params=["cpu", "reference-int8", "gpu"])
def sessions(request, bundle):
    """One for drafts, and one without any to compare with. Here "gpu" is its backend on CPU tensors."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "gpu":
            from tests.deploy.runtime.gpu_devices import pretend_gpu, torch_device

            pretend_gpu(monkeypatch, torch_device())
        return Session.open(bundle, backend=request.param), Session.open(bundle, backend=request.param)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_random_trees_change_no_token(sessions, sampling):
    session, plain = sessions
    prompt = session.encode_raw("Once upon")
    expected = plain.generate(prompt, GenerationOptions(40, sampling))
    text = [*prompt, *expected.token_ids]
    drafter = RandomDrafter([text], session.backend.shape.vocab_size, seed=1, taps=(0, 2))
    session.use(drafter)
    for _ in range(3):
        found = session.generate(prompt, GenerationOptions(40, sampling))
        assert (found.token_ids, found.text, found.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
        assert found.speculation.rounds <= len(found.token_ids)
        assert found.speculation.emitted == len(found.token_ids)
    assert sum(found.speculation.accepted) > 0


def test_stop_strings_and_end_tokens_end_it_within_a_draft(sessions, monkeypatch):
    session, plain = sessions
    prompt = session.encode_raw("Once upon")
    sampling = SamplingParams(1.2, seed=5)
    whole = plain.generate(prompt, GenerationOptions(40, sampling))
    stop = (whole.text[len(whole.text) // 2 :][:2],)
    end = whole.token_ids[len(whole.token_ids) // 2]
    session.use(RandomDrafter([[*prompt, *whole.token_ids]], session.backend.shape.vocab_size, seed=2))
    for options in (GenerationOptions(40, sampling, stop), GenerationOptions(25, sampling)):
        expected = plain.generate(prompt, options)
        found = session.generate(prompt, options)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
    for one in (plain, session):
        monkeypatch.setattr(one, "_eos", frozenset([end]))
    expected = plain.generate(prompt, GenerationOptions(40, sampling))
    found = session.generate(prompt, GenerationOptions(40, sampling))
    assert expected.finish_reason == "eos"
    assert (found.token_ids, found.text, found.finish_reason) == (expected.token_ids, expected.text, "eos")
    longer = [*prompt, *found.token_ids, *session.encode_raw("more")]
    assert (
        session.generate(longer, GenerationOptions(9)).token_ids
        == plain.generate(longer, GenerationOptions(9)).token_ids
    )


def test_many_requests_with_drafts_share_forwards(sessions):
    session, plain = sessions
    requests = [
        Request(session.encode_raw(text), GenerationOptions(12 + index, SamplingParams(index / 2, seed=index)))
        for index, text in enumerate(("Once", "Twice upon", "x" * 50, "y"))
    ]
    alone = [plain.generate(request.prompt, request.options).token_ids for request in requests]
    texts = [[*request.prompt, *tokens] for request, tokens in zip(requests, alone, strict=True)]
    session.use(RandomDrafter(texts, session.backend.shape.vocab_size, seed=7))
    found = dict(session.generate_many(requests, num_sequences=3))
    assert [found[index].token_ids for index in range(len(requests))] == alone


def test_it_takes_the_matching_branch_and_one_token_more(sessions):
    backend, sampling = sessions[0].backend, SamplingParams()
    backend.reset(5)
    (first,) = verify(backend, [Job(5, 0, [4, 5, 6], Draft(), sampling, 0)])
    backend.reset(5)
    text = [4, 5, 6, first.tokens[0]]
    (second,) = verify(backend, [Job(5, 0, text, Draft(), sampling, 0)])
    backend.reset(5)
    wrong = (first.tokens[0] + 1) % 263
    draft = Draft((wrong, first.tokens[0], 8, second.tokens[0]), (ROOT, ROOT, 0, 1))
    (found,) = verify(backend, [Job(5, 0, [4, 5, 6], draft, sampling, 0)], taps=(1, 2))
    assert found.tokens[:2] == (first.tokens[0], second.tokens[0])
    assert len(found.tokens) == 3
    assert found.computed == (4, 5, 6, first.tokens[0], second.tokens[0])
    assert found.features.shape == (5, 2 * backend.shape.hidden_size)
    assert backend.length(5) == 5
    backend.reset(5)


def test_a_drafted_row_without_a_token_ends_no_text_unless_the_text_goes_there(sessions, monkeypatch):
    backend, sampling = sessions[0].backend, SamplingParams()
    backend.reset(5)
    (first,) = verify(backend, [Job(5, 0, [4, 5, 6], Draft(), sampling, 0)])
    right, wrong = first.tokens[0], (first.tokens[0] + 1) % 263
    draft, choose = Draft((wrong, right), (ROOT, ROOT)), backend.forward_tokens

    def without(*sick):
        def forward_tokens(rows, *arguments, token_rows, **named):
            found = choose(rows, *arguments, token_rows=token_rows, **named)
            tokens = [
                NO_TOKEN if rows[row].token in sick and rows[row].position == 3 else token
                for row, token in zip(token_rows, found.tokens, strict=True)
            ]
            return ForwardTokens(tokens, found.taps)

        return forward_tokens

    for sick, message in (((wrong,), None), ((wrong, right), "the logits for position 4 are not finite")):
        backend.reset(5)
        monkeypatch.setattr(backend, "forward_tokens", without(*sick))
        if message is None:
            (found,) = verify(backend, [Job(5, 0, [4, 5, 6], draft, sampling, 0)])
            assert found.computed == (4, 5, 6, right)
            continue
        with pytest.raises(ValueError, match=message):
            verify(backend, [Job(5, 0, [4, 5, 6], draft, sampling, 0)])
        assert backend.length(5) == 0
    backend.reset(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"width": 17}, "width=17"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"min_probability": 1.0}, "min_probability=1.0"),
        ({"min_gain": -0.1}, "min_gain=-0.1"),
    ],
)
def test_limits_that_are_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TreeLimits(**changes)
