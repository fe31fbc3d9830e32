"""The torch engine against recomputing everything, and its sampling against the distribution that it samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from train.data.engines.base import Completion, Request
from train.data.engines.transformers_engine import TransformersEngine, choose_device

VOCABULARY = 61
END = 7


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def request(number: int, prompt: tuple[int, ...], **changes: Any) -> Request:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "sample_index": number}
    return Request(number, prompt, **(fields | changes))


def completed(model: Any, requests: list[Request], seed: int = 0, batch_size: int = 4) -> dict[int, Completion]:
    engine = TransformersEngine(model, frozenset({END}), batch_size=batch_size, seed=seed)
    for each in requests:
        engine.submit(each)
    return {found.number: found for found in engine.completions()}


@torch.inference_mode()
def slow_greedy(model: Any, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] != END):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_completions_are_what_recomputing_everything_gives(model: Any) -> None:
    rng = np.random.default_rng(0)
    prompts = [tuple(int(t) for t in rng.integers(8, VOCABULARY, size)) for size in (3, 11, 1, 6, 8, 2, 5)]
    requests = [request(index, prompt, max_tokens=4 + index) for index, prompt in enumerate(prompts)]
    found = completed(model, requests)
    for each in requests:
        expected = slow_greedy(model, each.prompt, each.max_tokens)
        assert found[each.number].token_ids == expected
        assert found[each.number].is_ended == (expected[-1] == END)


def test_an_end_token_ends_a_completion_and_is_part_of_it(model: Any) -> None:
    found = completed(model, [request(i, (9,), temperature=3.0, max_tokens=200) for i in range(12)])
    ended = [each for each in found.values() if each.is_ended]
    assert ended
    for each in ended:
        assert each.token_ids.index(END) == len(each.token_ids) - 1


def test_samples_follow_the_models_distribution_within_the_nucleus(model: Any) -> None:
    count, prompt = 1200, (9, 10, 11)
    requests = [request(i, prompt, max_tokens=1, temperature=1.7, top_p=0.8) for i in range(count)]
    found = completed(model, requests, batch_size=400)
    drawn = np.bincount([each.token_ids[0] for each in found.values()], minlength=VOCABULARY)
    with torch.inference_mode():
        probs = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 1.7, -1).numpy()
    order = np.argsort(-probs)
    nucleus = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.8)) + 1]
    assert drawn.sum() == drawn[nucleus].sum()
    expected = probs[nucleus] / probs[nucleus].sum() * count
    statistic = float(((drawn[nucleus] - expected) ** 2 / expected).sum())
    degrees = len(nucleus) - 1
    assert degrees >= 4
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_noise_hangs_on_seed_and_sample_index(model: Any) -> None:
    def drawn(sample_index: int, seed: int) -> tuple[int, ...]:
        only = request(0, (9, 10), temperature=2.0, max_tokens=16, sample_index=sample_index)
        return completed(model, [only], seed=seed)[0].token_ids

    assert drawn(1 << 32, 0) == drawn(1 << 32, 0)
    assert len({drawn(index, seed) for index in (0, 1, 1 << 32) for seed in (0, 1)}) == 6


def test_the_number_of_a_request_is_no_part_of_its_noise(model: Any) -> None:
    first = completed(model, [request(3, (9, 10), temperature=2.0, sample_index=5)])[3]
    second = completed(model, [request(8, (9, 10), temperature=2.0, sample_index=5)])[8]
    assert first.token_ids == second.token_ids


def test_closing_drops_what_is_waiting(model: Any) -> None:
    engine = TransformersEngine(model, frozenset({END}), batch_size=2, seed=0)
    for index in range(6):
        engine.submit(request(index, (9,)))
    completions = engine.completions()
    next(completions)
    completions.close()
    assert list(engine.completions()) == []


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"generate\.engine\.device=abacus cannot be used .*; use auto, cpu or cuda"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"generate\.engine\.device=cuda cannot be used"):
            choose_device("cuda")
        assert choose_device("auto")[0].type == "cpu"
