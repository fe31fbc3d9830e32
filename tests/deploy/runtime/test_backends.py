"""One session, two backends: the same tokens whatever is asked."""

import logging

import numpy as np
import pytest

from deploy.formats.bundle import Bundle
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.cpu import library
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.backends import open_backend
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

SAMPLING = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(1.0, seed=1),
    SamplingParams(0.7, top_k=12, seed=2),
    SamplingParams(1.3, top_p=0.8, seed=3),
    SamplingParams(2.0, min_p=0.05, seed=4),
    SamplingParams(1.5, 40, 0.95, 0.001, 1.2, (1 << 64) - 1),
]
TEXTS = ("Once", "The end of it", "x" * 70, "7", "Ümlaut 你好", "and so on and on", "!")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


@pytest.fixture(scope="module")
def sessions(bundle):
    """The native one and the one whose numbers it must have."""
    return Session.open(bundle, backend="cpu", threads=2), Session.open(bundle, backend="reference-int8")


def told(result):
    """An answer without its times."""
    return result.text, result.token_ids, result.finish_reason, result.num_prompt_tokens, result.num_cached_tokens


@pytest.mark.parametrize("params", SAMPLING, ids=str)
def test_one_answer_is_the_references(sessions, params):
    for sample_index in (0, 1 << 33):
        found = []
        for session in sessions:
            pieces = []
            prompt = session.encode_chat([{"role": "user", "content": "Grüße"}])
            result = session.generate(prompt, GenerationOptions(30, params, (), sample_index), pieces.append)
            found.append((told(result), pieces))
        assert found[0] == found[1]


def test_stop_strings_end_where_the_references_end(sessions):
    params = SamplingParams(1.5, seed=6)
    prompt = sessions[0].encode_raw("Once")
    whole = {session.generate(prompt, GenerationOptions(50, params)).text for session in sessions}.pop()
    for stops in ((whole[10:12],), (whole[20:21], whole[5:9]), ("never there",)):
        options = GenerationOptions(50, params, stops)
        results = [session.generate(prompt, options) for session in sessions]
        assert told(results[0]) == told(results[1])
    assert results[0].text == whole


def test_requests_in_flight_are_the_references(sessions):
    answers = []
    for session in sessions:
        requests = [
            Request(session.encode_raw(text), GenerationOptions(5 + 3 * index, SAMPLING[index], ("q",), index))
            for index, text in enumerate(TEXTS)
        ]
        found = dict(session.generate_many(requests, num_sequences=3))
        answers.append({index: told(result) for index, result in found.items()})
    assert len(answers[0]) == len(TEXTS)
    assert answers[0] == answers[1]


def test_a_second_turn_and_a_turn_taken_back_are_the_references(sessions):
    """The cache kept between turns, cut where the new prompt leaves the old one."""
    answers = []
    for session in sessions:
        options = GenerationOptions(10, SamplingParams(1.2, seed=9))
        prompt = session.encode_raw("Hello there")
        first = session.generate(prompt, options)
        longer = [*prompt, *first.token_ids, *session.encode_raw(" and then?")]
        second = session.generate(longer, options)
        edited = [*longer[:17], *session.encode_raw("something else")]
        third = session.generate(edited, options)
        session.generate(session.encode_raw("unrelated"), options)
        assert session.generate(edited, options).token_ids == third.token_ids
        answers.append([told(result) for result in (first, second, third)])
    assert answers[0] == answers[1]
    assert answers[0][2][-1] == 17


def test_truncating_is_the_references(sessions):
    logits = []
    for backend in (session.backend for session in sessions):
        answers = []
        backend.forward([Row(token, token, 5, token - 1) for token in range(50)], logit_rows=[])
        backend.keep(5, range(50))
        for length in (49, 33, 32, 31, 1):
            backend.truncate(5, length)
            answers.append(backend.forward([Row(7, length, 5)]).logits[0])
        backend.reset(5)
        logits.append(np.array(answers))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_backends_are_opened_by_name(bundle):
    assert isinstance(open_backend("cpu", bundle.model(), threads=1), CpuBackend)
    assert isinstance(open_backend("reference-int8", bundle.model()), ReferenceBackend)
    assert isinstance(open_backend("reference-bf16", bundle.model()), ReferenceBackend)


def test_an_unknown_backend_is_refused_with_the_known_ones(bundle):
    with pytest.raises(ValueError, match=r"backend='gpu9' is not known; use cpu, gpu, reference-int8, reference-bf16"):
        open_backend("gpu9", bundle.model())


def test_what_the_native_backend_does_not_support_is_refused(bundle, tmp_path, tiny, monkeypatch):
    with pytest.raises(ValueError, match="threads=0"):
        open_backend("cpu", bundle.model(), threads=0)
    odd = ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config(hidden_size=80), None))
    with pytest.raises(ValueError, match="hidden_size=80"):
        open_backend("cpu", odd)
    monkeypatch.setenv("UNDERSTUDY_ISA", "sse9")
    with pytest.raises(ValueError, match="UNDERSTUDY_ISA='sse9'"):
        open_backend("cpu", bundle.model())


def test_the_instruction_set_is_logged_once(bundle, monkeypatch, caplog):
    monkeypatch.setattr(library, "_shared", {})
    monkeypatch.setenv("UNDERSTUDY_ISA", "scalar")
    with caplog.at_level(logging.INFO, logger=library.__name__):
        for _ in range(3):
            open_backend("cpu", bundle.model(), threads=2)
    messages = [record.getMessage() for record in caplog.records if record.name == library.__name__]
    assert len(messages) == 1
    assert messages[0].startswith("native kernels: scalar, 2 threads")
