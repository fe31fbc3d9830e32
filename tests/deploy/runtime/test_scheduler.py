"""Continuous batching: an answer does not hang on when it was asked for, and what is cached is not computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.backend import ForwardTokens, Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.scheduler import Scheduler, shared_length
from deploy.runtime.session import Session

EOS = frozenset({2})


class CountingBackend(CpuBackend):
    """Remembers how many rows each call computed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.num_rows: list[int] = []

    def forward_tokens(self, rows: Sequence[Row], *arguments: Any, **named: Any) -> ForwardTokens:
        self.num_rows.append(len(rows))
        return super().forward_tokens(rows, *arguments, **named)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any, tiny: Any) -> Bundle:
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


@pytest.fixture
def backend(bundle: Bundle) -> CountingBackend:
    return CountingBackend(bundle.model(), threads=1)


def request(text: str, tokenizer: Any, number: int = 0, max_tokens: int = 6, **options: Any) -> Request:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=4)
    ids = tokenizer.encode(text).ids
    return Request(ids, GenerationOptions(max_tokens, sampling, sample_index=number, **options))


def test_answers_are_those_of_each_request_alone(bundle: Bundle, backend: CountingBackend, tiny: Any) -> None:
    tokenizer, session = tiny.tokenizer(), Session.open(bundle)
    texts = ["You are kind. A", "You are kind. B and more", "x", "You are kind. A", "You are", "Grüße " * 5]
    requests = [request(text, tokenizer, index, 3 + 2 * index) for index, text in enumerate(texts)]
    scheduler = Scheduler(backend, tokenizer, range(2), EOS)
    for each in requests:
        scheduler.submit(each)
    found = dict(scheduler.answers())
    assert sorted(found) == list(range(len(texts)))
    for index, each in enumerate(requests):
        alone = session.generate(each.prompt, each.options)
        assert (found[index].token_ids, found[index].text) == (alone.token_ids, alone.text)
        assert found[index].finish_reason == alone.finish_reason


def test_requests_may_come_while_others_are_answered(backend: CountingBackend, tiny: Any) -> None:
    tokenizer, order = tiny.tokenizer(), []
    scheduler = Scheduler(backend, tokenizer, range(1), EOS)
    scheduler.submit(request("first", tokenizer))
    scheduler.submit(request("second", tokenizer))
    for number, _ in scheduler.answers():
        order.append(number)
        if number == 0:
            assert scheduler.submit(request("urgent", tokenizer), is_next=True) == 2
            assert scheduler.submit(request("last", tokenizer)) == 3
    assert order == [0, 2, 1, 3]


def test_a_shared_beginning_is_computed_once_for_each_sequence(backend: CountingBackend, tiny: Any) -> None:
    tokenizer, system = tiny.tokenizer(), "A system prompt of some length. "
    scheduler = Scheduler(backend, tokenizer, range(2), EOS)
    for index in range(6):
        scheduler.submit(request(f"{system}{index}", tokenizer, index, max_tokens=1))
    cached = [answer.num_cached_tokens for _, answer in sorted(scheduler.answers())]
    assert cached == [0, 0, *[len(system)] * 4]
    assert backend.num_rows == [2 * len(system) + 2, 2, 2]


def test_a_continued_conversation_goes_where_its_turns_are(backend: CountingBackend, tiny: Any) -> None:
    tokenizer, texts = tiny.tokenizer(), ["alpha beta", "gamma delta"]
    scheduler = Scheduler(backend, tokenizer, range(2), EOS)
    first = [request(text, tokenizer, index) for index, text in enumerate(texts)]
    for each in first:
        scheduler.submit(each)
    cached = {}
    for number, answer in scheduler.answers():
        if number < 2:
            prompt = [*first[number].prompt, *answer.token_ids, *tokenizer.encode(" more").ids]
            scheduler.submit(Request(prompt, first[number].options), is_next=True)
            cached[number] = len(first[number].prompt) + len(answer.token_ids) - 1
        else:
            assert answer.num_cached_tokens in cached.values()


def test_closing_early_forgets_everything_and_empties_the_caches(backend: CountingBackend, tiny: Any) -> None:
    tokenizer = tiny.tokenizer()
    scheduler = Scheduler(backend, tokenizer, range(2), EOS)
    for index in range(5):
        scheduler.submit(request("some text", tokenizer, index, max_tokens=2 + index))
    answers = scheduler.answers()
    next(answers)
    assert backend.length(0) > 0
    answers.close()
    assert [backend.length(sequence) for sequence in range(2)] == [0, 0]
    assert list(scheduler.answers()) == []


def test_an_interrupt_as_a_request_begins_loses_no_sequence(
    backend: CountingBackend, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, truncate = tiny.tokenizer(), backend.truncate
    scheduler = Scheduler(backend, tokenizer, range(1), EOS)
    for text in ("first of some length", "first of some length, and more"):
        scheduler.submit(request(text, tokenizer))
    answers = scheduler.answers()
    next(answers)

    def interrupted(sequence: int, length: int) -> None:
        truncate(sequence, length)
        assert backend.length(sequence) > 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(backend, "truncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    assert backend.length(0) == 0
    number = scheduler.submit(request("another", tokenizer))
    assert [found for found, _ in scheduler.answers()] == [number]


def test_text_is_decoded_alike_with_and_without_a_listener(backend: CountingBackend, tiny: Any) -> None:
    tokenizer, pieces = tiny.tokenizer(), []
    scheduler = Scheduler(backend, tokenizer, range(3), EOS)
    plain = request("Once", tokenizer, max_tokens=40)
    scheduler.submit(plain)
    scheduler.submit(Request(plain.prompt, plain.options, pieces.append))
    scheduler.submit(request("Once", tokenizer, max_tokens=40, stop=("\x00\x00\x00",)))
    texts = {answer.text for _, answer in scheduler.answers()}
    assert texts == {"".join(pieces)}


def test_what_the_reader_does_between_answers_is_no_time_of_theirs(backend: CountingBackend, tiny: Any) -> None:
    tokenizer = tiny.tokenizer()
    scheduler = Scheduler(backend, tokenizer, range(1, 4), frozenset())
    for text in ("one", "two", "six"):
        scheduler.submit(request(text, tokenizer))
    seconds = []
    for _, answer in scheduler.answers():
        seconds.append(answer.decode_seconds)
        time.sleep(0.2)
    assert len(seconds) == 3
    assert max(seconds) - min(seconds) < 0.1


def test_the_shared_length_is_where_two_texts_part() -> None:
    assert shared_length([1, 2, 3], (1, 2, 4, 5)) == 2
    assert shared_length([], [1]) == shared_length([1], []) == shared_length([2], [1]) == 0
    assert shared_length([1, 2], [1, 2]) == shared_length([1, 2], [1, 2, 3]) == 2
