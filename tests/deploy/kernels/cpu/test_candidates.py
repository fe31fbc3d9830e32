"""Native candidates against deploy/kernels/reference/candidates.py: the same tokens, and scores to the bit."""

import numpy as np
import pytest

from deploy.kernels.reference.candidates import candidates
from deploy.runtime.cpu_sampling import candidates_native, sample_native
from deploy.runtime.sampling import SamplingParams, sample

PARAMS = [
    {},
    {"repetition_penalty": 1.7},
    {"temperature": 0.8},
    {"temperature": 1.3, "repetition_penalty": 0.8},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.99, "min_p": 0.01, "top_k": 200},
    {"temperature": 0.001},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_and_scores_are_the_references(runtime, params):
    rng = np.random.default_rng(21)
    for case in range(30):
        size = int(rng.integers(1, 700))
        logits = (rng.standard_normal(size) * rng.choice([0.1, 3, 30])).astype(np.float32)
        if case % 3 == 0:  # ties
            logits = np.round(logits)
        path = rng.integers(0, size, int(rng.integers(0, 30))).tolist()
        how = SamplingParams(**params, seed=int(rng.integers(1 << 63)))
        where = {"position": int(rng.integers(1, 9000)), "path": path, "sample_index": int(rng.integers(1 << 40))}
        for count in (1, 2, 16):
            found = candidates_native(runtime, logits, how, count, **where)
            assert found == candidates(logits, how, count, **where)
            assert found[0][0] == sample_native(runtime, logits, how, **where)


def test_a_large_vocabulary_gives_the_references_candidates(runtime):
    rng = np.random.default_rng(22)
    for size, spread in ((20_001, 1.0), (9_984, 8.0)):
        logits = (spread * rng.standard_normal(size)).astype(np.float32)
        for params in ({}, {"temperature": 0.9}, {"temperature": 1.5, "top_p": 0.97}):
            how = SamplingParams(**params, seed=5)
            assert candidates_native(runtime, logits, how, 9, position=3) == candidates(logits, how, 9, position=3)


def test_a_trimmed_vocabulary_gives_ids_and_their_noise(runtime):
    rng = np.random.default_rng(23)
    ids = np.sort(rng.choice(1 << 17, 333, replace=False)).astype(np.int64)
    logits = rng.standard_normal(333).astype(np.float32)
    path = [0, *ids[[5, 100]].tolist(), 1 << 17]
    for params in ({"repetition_penalty": 3.0}, {"temperature": 0.8, "repetition_penalty": 3.0}):
        how = SamplingParams(**params, seed=9)
        where = {"position": 7, "path": path, "token_ids": ids}
        found = candidates_native(runtime, logits, how, 5, **where)
        assert found == candidates(logits, how, 5, **where)
        assert found[0][0] == sample_native(runtime, logits, how, **where)
        assert set(found[0]) <= set(ids.tolist())


def test_scores_are_logarithms_of_probabilities(runtime):
    """Greedy: of the softmax, in float64. Sampled: of the softmax over noisy logits, the largest of which is chosen."""
    rng = np.random.default_rng(24)
    logits = (2 * rng.standard_normal(50)).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    tokens, scores = candidates_native(runtime, logits, SamplingParams(), 50, position=1)
    np.testing.assert_allclose(scores, exact[tokens], rtol=1e-6, atol=1e-6)
    assert tokens == np.argsort(-logits, kind="stable").tolist()
    how = SamplingParams(temperature=1.0, top_k=10, seed=3)
    tokens, scores = candidates_native(runtime, logits, how, 50, position=1)
    assert len(tokens) == 10
    assert tokens[0] == sample(logits, how, position=1)
    assert np.exp(np.array(scores, dtype=np.float64)).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_logits_that_are_not_finite_are_refused(runtime, bad):
    logits = np.zeros(77, dtype=np.float32)
    logits[76] = bad
    for how in (SamplingParams(), SamplingParams(temperature=1.0)):
        with pytest.raises(ValueError, match="position 4 are not finite"):
            candidates_native(runtime, logits, how, 2, position=4)
        with pytest.raises(ValueError, match="position 4 are not finite"):
            candidates(logits, how, 2, position=4)
