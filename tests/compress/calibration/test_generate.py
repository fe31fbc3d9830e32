"""Which self-written texts are kept, and what free ones begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.calibration.generate import (
    Continuation,
    FreeTextBudget,
    SamplingRule,
    drop_most_perplexing,
    write_free_texts,
)
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.stages.text_writer import RuntimeWriter


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


def test_free_texts_begin_with_a_word_and_are_as_many_as_asked_for(
    tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path: Path = tmp_path_factory.mktemp("free")
    tiny.causal_lm().save_pretrained(path)
    backend = CpuBackend(path, threads=1)
    vocabulary = {chr(65 + index): 60 + index for index in range(20)} | {"Ġx": 5, "é": 6, "lower": 7}
    written: list[int] = []
    rule, budget = SamplingRule(1.0, 0.9, frozenset()), FreeTextBudget(num_samples=7, num_tokens=9, drop_share=0.2)
    texts = [
        write_free_texts(RuntimeWriter(backend, written.append), vocabulary, rule, budget, seed=seed)
        for seed in (4, 4, 5)
    ]
    assert len(texts[0]) == 7
    assert all(60 <= text[0] < 80 and len(text) == 10 for text in texts[0])
    assert texts[0] == texts[1] != texts[2]
    assert len({text[0] for text in texts[0]}) > 2
    assert sum(written) == 3 * budget.most_tokens == 3 * 9 * 9  # a fifth more than seven are begun


def test_a_vocabulary_without_words_is_refused() -> None:
    rule, budget = SamplingRule(1.0, 0.9, frozenset()), FreeTextBudget(num_samples=7, num_tokens=9, drop_share=0.2)
    nobody: Any = None
    with pytest.raises(ValueError, match=r"set calibrate\.free\.num_samples=0$"):
        write_free_texts(nobody, {"Ġx": 5, "lower": 7, "X1": 8}, rule, budget, seed=0)
