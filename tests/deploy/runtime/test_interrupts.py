"""A KeyboardInterrupt between any two bytecodes of ours leaves a session that answers as if it had never come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import deploy
from deploy.formats.bundle import Bundle
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.modes import MODES, DrafterFactory, Mode
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

OURS = str(Path(deploy.__file__).parent)
ROUNDS = 12


@contextmanager
def interrupted_at(count: int) -> Iterator[None]:
    """Raises KeyboardInterrupt before the bytecode number `count` of code under deploy/, if it comes to that."""
    left = count

    def within(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return within

    def called(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        return within

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)


class Conversation:
    """Prompts that go on, go back or begin anew, and how they are to be answered."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.prompt: list[int] = []

    def next_request(self) -> Request:
        rng, kind = self.rng, self.rng.integers(4)
        if kind == 0:
            self.prompt = self.prompt[: int(rng.integers(1, 40))]
        elif kind == 1:
            self.prompt = []
        few = int(rng.choice([3, 12, 263]))  # of few tokens texts repeat themselves, and lookups have something to do
        self.prompt = [*self.prompt, *rng.integers(0, few, rng.integers(1, 30)).tolist()][:80]
        sampling = SamplingParams(
            float(rng.choice([0.0, 0.7, 1.5])), top_p=float(rng.choice([1.0, 0.8])), seed=int(rng.integers(5))
        )
        return Request(list(self.prompt), GenerationOptions(int(rng.integers(1, 30)), sampling))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "b"
    tiny.hierarchy(path, None)
    return Bundle.open(tiny.finish_hierarchy(path))


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> Session:
    return Session.open(bundle, threads=1)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "plain"])
def test_an_interrupt_anywhere_costs_no_later_answer_a_word(bundle: Bundle, plain: Session, mode: Mode) -> None:
    session, talk = Session.open(bundle, threads=1), Conversation(seed=MODES.index(mode))
    session.use(DrafterFactory(bundle, session.backend, "cpu", 1).make(mode))
    num_interrupted = 0
    for number in range(ROUNDS):
        request = talk.next_request()
        try:
            with interrupted_at(int(10 ** talk.rng.uniform(1.5, 4.3))):
                if number % 3 == 2:
                    list(session.generate_many([request, talk.next_request()], num_sequences=2))
                else:
                    session.generate(request.prompt, request.options)
        except KeyboardInterrupt:
            num_interrupted += 1
        for _ in range(2):
            later = talk.next_request()
            found, expected = (each.generate(later.prompt, later.options) for each in (session, plain))
            assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
            talk.prompt = [*talk.prompt, *found.token_ids]
        requests = [talk.next_request() for _ in range(2)]
        many = dict(session.generate_many(requests, num_sequences=2))
        for index, each in enumerate(requests):
            assert many[index].token_ids == plain.generate(each.prompt, each.options).token_ids
    assert num_interrupted >= ROUNDS // 3
