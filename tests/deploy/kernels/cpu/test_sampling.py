"""Native sampling against deploy/runtime/sampling.py, token for token."""

import numpy as np
import pytest

from deploy.runtime.cpu_sampling import sample_native
from deploy.runtime.sampling import SamplingParams, sample

PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.001},
    {"temperature": 100.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 5.0, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 3.0, "top_p": 0.999999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 0.7},
    {"temperature": 0.0, "repetition_penalty": 2.5},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_token_is_the_references(runtime, params):
    rng = np.random.default_rng(11)
    for case in range(40):
        size = int(rng.integers(1, 700))
        logits = (rng.standard_normal(size) * rng.choice([0.1, 3, 30])).astype(np.float32)
        if case % 3 == 0:  # ties
            logits = np.round(logits)
        path = rng.integers(0, size, int(rng.integers(0, 30))).tolist()
        chosen = SamplingParams(**params, seed=int(rng.integers(1 << 63)))
        where = {"position": int(rng.integers(1, 9000)), "path": path, "sample_index": int(rng.integers(1 << 40))}
        assert sample_native(runtime, logits, chosen, **where) == sample(logits, chosen, **where)


def test_a_large_flat_vocabulary_gives_the_references_token(runtime):
    rng = np.random.default_rng(12)
    logits = rng.standard_normal(20_001).astype(np.float32)
    for params in ({"top_p": 0.97}, {}, {"min_p": 0.3}, {"top_k": 15_000, "top_p": 0.5}):
        for position in range(5):
            chosen = SamplingParams(temperature=1.5, **params, seed=position)
            expected = sample(logits, chosen, position=position)
            assert sample_native(runtime, logits, chosen, position=position) == expected


def test_equal_logits_fall_to_the_lower_id(runtime):
    logits = np.zeros(100, dtype=np.float32)
    assert sample_native(runtime, logits, SamplingParams(), position=1) == 0
    for top_p in (0.01, 0.25, 0.255, 0.5, 1.0):
        params = SamplingParams(temperature=1.0, top_p=top_p, seed=5)
        assert sample_native(runtime, logits, params, position=3) == sample(logits, params, position=3)


def test_a_trimmed_vocabulary_shares_the_noise_of_its_ids(runtime):
    """Cutting tokens that would not have been chosen changes nothing."""
    rng = np.random.default_rng(13)
    logits = (3 * rng.standard_normal(400)).astype(np.float32)
    for seed in range(30):
        params = SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=seed)
        token = sample(logits, params, position=9, path=[3, 200, 399])
        ids = np.unique(np.append(rng.choice(400, 100), token)).astype(np.int64)
        found = sample_native(runtime, logits[ids], params, position=9, path=[3, 200, 399], token_ids=ids)
        assert found == token


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_logits_that_are_not_finite_are_refused(runtime, bad):
    logits = np.zeros(77, dtype=np.float32)
    logits[76] = bad
    with pytest.raises(ValueError, match="position 4 are not finite"):
        sample_native(runtime, logits, SamplingParams(), position=4)


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {}], ids=str)
def test_logits_that_a_low_temperature_makes_infinite_are_refused(runtime, params):
    logits = np.array([3e38, 2e38, 1e38, -3e38] * 9, dtype=np.float32)
    with pytest.raises(ValueError, match="position 4 are not finite"):
        sample_native(runtime, logits, SamplingParams(temperature=0.5, **params), position=4)


def test_frequencies_follow_the_distribution(runtime):
    """χ² of 20 000 samples against softmax over the survivors of top-k, 9 degrees of freedom."""
    logits = np.linspace(-1, 1.5, 40).astype(np.float32)
    params = [SamplingParams(temperature=0.8, top_k=10, seed=7)]
    counts = np.zeros(40)
    for index in range(20_000):
        counts[sample_native(runtime, logits, params[0], position=1, sample_index=index)] += 1
    weights = np.exp(logits[30:].astype(np.float64) / 0.8)
    expected = 20_000 * weights / weights.sum()
    assert counts[:30].sum() == 0
    assert float((np.square(counts[30:] - expected) / expected).sum()) < 27.9  # p = 0.001
