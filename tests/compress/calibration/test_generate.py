"""Sampling a batch of continuations: batches equal single texts, for any padding and any order of endings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compress.calibration import generate
from compress.calibration.generate import (
    Continuation,
    SamplingRule,
    drop_most_perplexing,
    sample_continuations,
    sampling_dtype,
    write_free_texts,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [200, 3], [77, 78, 79, 80, 81]]


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.causal_lm()


def sample(model: Any, prompts: list[list[int]], *, num_tokens: int = 12, **changes: Any) -> list[Continuation]:
    rule: dict[str, Any] = {"end_ids": frozenset(), "temperature": 1e-4, "top_p": 0.9}  # as good as greedy
    rule |= {key: changes.pop(key) for key in list(changes) if key in rule}
    arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "on_step": lambda num_rows: None}
    return sample_continuations(model, prompts, SamplingRule(**rule), num_tokens=num_tokens, **(arguments | changes))


def greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """One token at a time, without cache, padding or batch."""
    ids, log_probs = list(prompt), []
    for _ in range(num_tokens):
        with torch.inference_mode():
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
        ids.append(int(scores.argmax()))
        log_probs.append(float(scores.max()))
    return ids[len(prompt) :], log_probs


def test_a_padded_batch_writes_what_each_prompt_alone_would(model: Any) -> None:
    for prompt, found in zip(PROMPTS, sample(model, PROMPTS), strict=True):
        tokens, log_probs = greedy(model, prompt, 12)
        assert found.tokens == tokens
        assert found.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert not found.is_finished


def ends_at(model: Any, *steps: int) -> frozenset[int]:
    """Tokens that end some of the texts at different steps."""
    texts = [greedy(model, prompt, 12)[0] for prompt in PROMPTS]
    return frozenset(text[step] for text, step in zip(texts, steps, strict=False))


@pytest.mark.parametrize("compact_below", [0.0, 0.75, 1.1])
def test_finished_rows_stop_and_leave_without_a_trace(
    model: Any, monkeypatch: pytest.MonkeyPatch, compact_below: float
) -> None:
    monkeypatch.setattr(generate, "COMPACT_BELOW", compact_below)
    end_ids = ends_at(model, 0, 2, 5)
    written: list[int] = []
    found = sample(model, PROMPTS, end_ids=end_ids, on_step=written.append)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        tokens, _ = greedy(model, prompt, 12)
        stop = next((i + 1 for i, token in enumerate(tokens) if token in end_ids), None)
        assert continuation.tokens == tokens[:stop]
        assert len(continuation.log_probs) == len(continuation.tokens)
        assert continuation.is_finished == (stop is not None)
    assert written == sorted(written, reverse=True)
    assert written[0] < len(PROMPTS)


def test_it_ends_early_when_every_row_has_ended(model: Any) -> None:
    steps: list[int] = []
    found = sample(model, PROMPTS, end_ids=frozenset(range(271)), on_step=steps.append)
    assert steps == [0]
    assert all(len(continuation.tokens) == 1 for continuation in found)


def test_the_generators_seed_decides_the_text(model: Any) -> None:
    texts = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        texts.append([c.tokens for c in sample(model, PROMPTS, temperature=1.0, top_p=0.95, generator=generator)])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sampling_follows_the_truncated_distribution() -> None:
    """4000 rows of the same logits: frequencies within 4 standard deviations of the nucleus."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = torch.empty(5)
    logits[order] = probs.log()
    picks = generate._sample(
        logits.expand(4000, 5), SamplingRule(1.0, 0.9, frozenset()), torch.Generator().manual_seed(0)
    )
    nucleus = probs[:3] / probs[:3].sum()  # the first three reach 0.9
    for rank, token in enumerate(order.tolist()):
        expected = float(nucleus[rank]) if rank < 3 else 0.0
        share = float((picks == token).float().mean())
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / 4000)


def continuation(*log_probs: float) -> Continuation:
    return Continuation([0] * len(log_probs), list(log_probs))


def test_the_most_perplexing_share_is_dropped_and_the_order_kept() -> None:
    parts = [[continuation(-1.0, -3.0)], [continuation(-9.0)], [continuation(-0.5)], [continuation(-2.5)]]
    assert drop_most_perplexing(parts, share=0.25, min_kept=0) == [0, 2, 3]
    assert drop_most_perplexing(parts, share=0.5, min_kept=0) == [0, 2]
    assert drop_most_perplexing(parts, share=0.5, min_kept=3) == [0, 2, 3]
    assert drop_most_perplexing(parts, share=0.0, min_kept=0) == [0, 1, 2, 3]


def test_perplexity_is_taken_over_all_parts_by_token() -> None:
    long_and_bad = [continuation(-0.1), continuation(*[-4.0] * 9)]
    short_and_bad = [continuation(*[-0.1] * 9), continuation(-4.0)]
    assert drop_most_perplexing([long_and_bad, short_and_bad], share=0.5, min_kept=0) == [1]


def test_free_texts_begin_with_a_word_and_are_as_many_as_asked_for(model: Any) -> None:
    vocabulary = {chr(65 + index): 60 + index for index in range(20)} | {"Ġx": 5, "é": 6, "lower": 7}
    steps: list[int] = []
    rule = SamplingRule(1.0, 0.9, frozenset())
    arguments: dict[str, Any] = {"num_samples": 7, "num_tokens": 9, "drop_share": 0.2}
    texts = [
        write_free_texts(model, vocabulary, rule, **arguments, seed=seed, on_step=steps.append) for seed in (4, 4, 5)
    ]
    assert len(texts[0]) == 7
    assert all(60 <= text[0] < 80 and len(text) == 10 for text in texts[0])
    assert texts[0] == texts[1] != texts[2]
    assert steps == [1] * 27


@pytest.mark.parametrize(("is_native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_cpu_alone_decides_the_type_for_that_is_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert sampling_dtype() == expected
