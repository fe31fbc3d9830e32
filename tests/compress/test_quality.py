"""Perplexity, KL divergence and agreement, against slow loops and against closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress.quality import ROWS_AT_A_TIME, compare_rows, measure


def slow_sums(source: np.ndarray, model: np.ndarray, targets: np.ndarray) -> tuple[float, float, float, int]:
    """The four sums, one token of the vocabulary at a time in float64."""
    totals, same = [0.0, 0.0, 0.0], 0
    for p_logits, q_logits, target in zip(source.astype(np.float64), model.astype(np.float64), targets, strict=True):
        p_norm, q_norm = (math.log(sum(math.exp(x) for x in row)) for row in (p_logits, q_logits))
        totals[0] += p_norm - p_logits[target]
        totals[1] += q_norm - q_logits[target]
        totals[2] += sum(
            math.exp(p - p_norm) * ((p - p_norm) - (q - q_norm)) for p, q in zip(p_logits, q_logits, strict=True)
        )
        same += int(np.argmax(p_logits) == np.argmax(q_logits))
    return totals[0], totals[1], totals[2], same


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (7, 101), (5, 263)])
def test_sums_over_rows_are_the_slow_loops(rows: int, vocabulary: int) -> None:
    rng = np.random.default_rng(rows)
    source = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    model = (source + rng.standard_normal(source.shape)).astype(np.float32)
    targets = rng.integers(0, vocabulary, rows)
    found = compare_rows(torch.from_numpy(source), torch.from_numpy(model), torch.from_numpy(targets))
    expected = slow_sums(source, model, targets)
    assert found[3] == expected[3]
    np.testing.assert_allclose(found[:3], expected[:3], rtol=2e-5)


def test_a_known_pair_of_distributions_gives_its_divergence() -> None:
    source, model = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    _, nll, kl, _ = compare_rows(source, model, torch.tensor([1]))
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert nll == pytest.approx(math.log(2))


def test_a_model_agrees_with_itself(tiny: Any, ids: Callable[..., torch.Tensor]) -> None:
    model = tiny.causal_lm()
    found, source = measure(model, model, ids(2, 33).tolist())
    assert (found.kl, found.agreement, found.num_tokens) == (0.0, 1.0, 64)
    assert found.perplexity == source.perplexity


def test_perplexity_is_that_of_transformers_own_loss(tiny: Any, ids: Callable[..., torch.Tensor]) -> None:
    source, model = tiny.causal_lm(seed=1), tiny.causal_lm(seed=2)
    sequence = ids(1, 140)  # more than one slice of rows
    assert sequence.shape[1] > ROWS_AT_A_TIME
    with torch.inference_mode():
        losses = [float(each(sequence, labels=sequence).loss) for each in (model, source)]
    found = measure(source, model, sequence.tolist())
    np.testing.assert_allclose([quality.perplexity for quality in found], np.exp(losses), rtol=1e-4)


def test_sequences_weigh_by_their_tokens(tiny: Any, ids: Callable[..., torch.Tensor]) -> None:
    source, model = tiny.causal_lm(seed=1), tiny.causal_lm(seed=2)
    long, short = ids(1, 30)[0].tolist(), ids(1, 5, seed=9)[0].tolist()
    seen: list[int] = []
    both, _ = measure(source, model, [long, short], on_tokens=seen.append)
    alone = [measure(source, model, [each])[0] for each in (long, short)]
    assert seen == [29, 4]
    assert both.num_tokens == 33
    assert both.kl == pytest.approx((29 * alone[0].kl + 4 * alone[1].kl) / 33, rel=1e-5)
    assert both.agreement == pytest.approx((29 * alone[0].agreement + 4 * alone[1].agreement) / 33)


def test_a_small_perturbation_costs_the_second_order_of_its_size(tiny: Any, ids: Callable[..., torch.Tensor]) -> None:
    """KL(p ‖ p + δ) is half the variance of δ under p for small δ: scaled down by 2, it falls by 4."""
    source = tiny.causal_lm(tie_word_embeddings=False)
    noise = torch.randn(source.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (0.02, 0.01):
        model = copy.deepcopy(source)
        model.lm_head.weight.data += size * noise
        found.append(measure(source, model, ids(1, 40).tolist())[0].kl)
    with torch.inference_mode():
        hidden = source.model(ids(1, 40)).last_hidden_state[0, :-1].double()
        p = torch.softmax(source.lm_head(hidden.float()).double(), -1)
        delta = hidden @ (0.01 * noise.double()).T
        variance = (p * delta**2).sum(-1) - (p * delta).sum(-1) ** 2
    assert found[1] == pytest.approx(float(variance.mean() / 2), rel=0.05)
    assert found[0] / found[1] == pytest.approx(4, rel=0.1)


def test_a_head_that_ranks_another_token_first_agrees_nowhere(tiny: Any, ids: Callable[..., torch.Tensor]) -> None:
    source = tiny.causal_lm(tie_word_embeddings=False)
    model = copy.deepcopy(source)
    model.lm_head.weight.data.neg_()
    assert measure(source, model, ids(1, 20).tolist())[0].agreement == 0.0


def test_nothing_to_measure_on_is_refused(tiny: Any) -> None:
    model = tiny.causal_lm()
    with pytest.raises(ValueError, match="no held-out tokens to measure on"):
        measure(model, model, [])
