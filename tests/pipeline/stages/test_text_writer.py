"""Texts by the runtime: each as if it were written alone, whatever else is written beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.calibration.generate import Continuation, SamplingRule
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams, sample
from pipeline.stages import text_writer
from pipeline.stages.text_writer import RuntimeWriter
from tests.tiny_llama import TINY_LLAMA

PROMPTS = {0: [5, 6, 7], 3: [8], 4: list(range(20, 60)), 9: [90, 3], 11: [77, 78, 79, 80, 81]}
RULE = SamplingRule(1.0, 0.9, frozenset({7, 30}))
NUM_TOKENS = 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("writer")
    config = AutoConfig.for_model(**TINY_LLAMA, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def backend(model_dir: Path) -> CpuBackend:
    return CpuBackend(model_dir, threads=2)


def write(backend: CpuBackend, prompts: dict[int, list[int]] = PROMPTS, **changes: Any) -> dict[int, Continuation]:
    done: list[int] = []
    arguments = {"num_tokens": NUM_TOKENS, "seed": 5} | changes
    found = RuntimeWriter(backend, done.append).continue_texts(prompts, RULE, **arguments)
    assert sum(done) == arguments["num_tokens"] * len(prompts)
    return found


def alone(model_dir: Path, number: int, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Continuation:
    """One token at a time, each from the whole text's logits."""
    backend, text, found = CpuBackend(model_dir, threads=1), list(prompt), Continuation()
    params = SamplingParams(RULE.temperature, top_p=RULE.top_p, seed=5)
    while len(found.tokens) < num_tokens and not found.is_finished:
        rows = [Row(token, position, 0, position - 1) for position, token in enumerate(text)]
        logits = backend.forward(rows, logit_rows=[len(text) - 1]).logits[0]
        backend.reset(0)
        text.append(sample(logits, params, position=len(text), sample_index=number))
        scores = torch.log_softmax(torch.from_numpy(logits).double(), -1)
        found.tokens.append(text[-1])
        found.log_probs.append(float(scores[text[-1]]))
        found.is_finished = text[-1] in RULE.end_ids
    return found


def assert_same(found: Continuation, expected: Continuation) -> None:
    assert (found.tokens, found.is_finished) == (expected.tokens, expected.is_finished)
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


@pytest.mark.parametrize(("at_a_time", "rows_per_call"), [(64, 512), (2, 16), (1, 3)])
def test_each_text_is_what_it_would_be_alone(
    model_dir: Path, backend: CpuBackend, monkeypatch: pytest.MonkeyPatch, at_a_time: int, rows_per_call: int
) -> None:
    monkeypatch.setattr(text_writer, "NUM_SEQUENCES", at_a_time)
    monkeypatch.setattr(text_writer, "ROWS_PER_CALL", rows_per_call)
    found = write(backend)
    assert list(found) == list(PROMPTS)
    for number, prompt in PROMPTS.items():
        assert_same(found[number], alone(model_dir, number, prompt))
    assert {text.is_finished for text in found.values()} == {True, False}  # the rule ends some and not others
    assert all(backend.length(number) == 0 for number in PROMPTS)


def test_a_text_that_goes_on_is_not_read_again(
    model_dir: Path, backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RuntimeWriter(backend, lambda count: None)
    first = writer.continue_texts(PROMPTS, RULE, num_tokens=6, seed=5, will_go_on=True)
    prompts = {number: [*PROMPTS[number], *first[number].tokens, 40, 41] for number in (0, 4, 11)}
    computed: list[int] = []
    forward = backend.forward

    def counted(rows: list[Row], **options: Any) -> Any:
        computed.append(len(rows))
        return forward(rows, **options)

    monkeypatch.setattr(backend, "forward", counted)
    found = writer.continue_texts(prompts, RULE, num_tokens=8, seed=5)
    assert computed == [2 * len(prompts)]  # the last token of the first text and 40; 41 is written from
    for number, prompt in prompts.items():
        assert_same(found[number], alone(model_dir, number, prompt, 8))
    assert all(backend.length(number) == 0 for number in PROMPTS)


def test_number_seed_and_position_decide_the_noise(backend: CpuBackend) -> None:
    same = {number: [5, 6, 7] for number in range(4)}
    texts = [text.tokens for text in write(backend, same).values()]
    assert len({tuple(text) for text in texts}) == 4
    assert [text.tokens for text in write(backend, same).values()] == texts
    assert [text.tokens for text in write(backend, same, seed=6).values()] != texts


def test_more_than_the_context_holds_is_refused(backend: CpuBackend) -> None:
    with pytest.raises(ValueError, match=r"^89 tokens behind a prompt of 40 exceed the target's context of 128$"):
        write(backend, num_tokens=89)


def test_weights_that_give_no_logits_are_named(model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.model.norm.weight.data.fill_(np.inf)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^the logits for position \d+ are not finite"):
        write(CpuBackend(tmp_path, threads=1))
