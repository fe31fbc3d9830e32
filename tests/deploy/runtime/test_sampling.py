import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.kernels.cpu.library import Runtime
from deploy.runtime.cpu_sampling import sample_native
from deploy.runtime.sampling import SamplingParams, gumbel_noise, philox4x32, sample, survivors

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    ours = philox4x32(np.array([words(counter)], dtype=np.uint32), tuple(words(key)))
    assert ours[0].tolist() == words(answer)


def slow_philox(counter, key):
    """The paper's rounds in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@given(st.integers(0, 200_000), st.integers(0, 2**31), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_noise_uses_the_documented_counter_and_key(token, position, index, seed):
    tokens = np.array([token + 5, token, token + 1], dtype=np.int64)
    noise = gumbel_noise(tokens, position=position, sample_index=index, seed=seed)
    for i, t in enumerate(tokens.tolist()):
        counter = (t >> 2, position, index & 0xFFFFFFFF, index >> 32)
        word = slow_philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[t & 3]
        uniform = ((word >> 9) + 0.5) * 2.0**-23
        assert noise[i] == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-6)


def test_samples_follow_the_distribution():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -1.0, 1.5], dtype=np.float32)
    params = SamplingParams(temperature=0.8, seed=11)
    count = 6000
    seen = np.bincount([sample(logits, params, position=i) for i in range(count)], minlength=7)
    expected = np.exp(logits.astype(np.float64) / 0.8)
    expected *= count / expected.sum()
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 22.5  # 6 degrees of freedom, p = 0.001


def test_seeds_and_sample_indices_give_independent_samples():
    logits = np.zeros(64, dtype=np.float32)
    streams = [
        [sample(logits, SamplingParams(temperature=1.0, seed=seed), position=i, sample_index=n) for i in range(200)]
        for seed, n in ((0, 0), (1, 0), (2**32, 0), (0, 1), (0, 2**32))
    ]
    for i, first in enumerate(streams):
        for second in streams[i + 1 :]:
            assert np.mean(np.array(first) == np.array(second)) < 0.1


def naive_survivors(logits, params, path):
    """Everything by sorting Python lists; float64 where the definition says float32 is compared elsewhere."""
    z = [np.float32(v) for v in logits]
    for token in set(path):
        factor = np.float32(params.repetition_penalty)
        z[token] = z[token] / factor if z[token] > 0 else z[token] * factor
    z = [v / np.float32(params.temperature) for v in z]
    ids = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if params.top_k:
        ids = ids[: params.top_k]
    weights = {i: math.exp(float(z[i]) - float(z[ids[0]])) for i in ids}
    total, running, kept = sum(weights.values()), 0.0, []
    for i in ids:
        kept.append(i)
        running += weights[i]
        if running >= params.top_p * total:
            break
    return [i for i in kept if weights[i] >= params.min_p]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_truncation_equals_a_naive_implementation(data):
    size = data.draw(st.integers(1, 40))
    # Few distinct logits, so that ties are common; fractions that no sum of their weights meets exactly.
    logits = np.array(data.draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size)), dtype=np.float32) / 2
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, size + 3)),
        top_p=data.draw(st.sampled_from([1.0, 0.9123, 0.5321, 0.1234])),
        min_p=data.draw(st.sampled_from([0.0, 0.0513, 0.3171])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.25, 0.8])),
    )
    path = data.draw(st.lists(st.integers(0, size - 1), max_size=8))
    ours, z = survivors(logits, params, path)
    assert ours.tolist() == naive_survivors(logits, params, path)
    assert len(z) == len(ours)
    chosen = sample(logits, params, position=3, path=path)
    noise = gumbel_noise(ours, position=3, sample_index=0, seed=0)
    assert chosen == min(ours[(z + noise) == (z + noise).max()])


def test_ties_at_temperature_zero_go_to_the_lower_id():
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    assert sample(logits, SamplingParams(), position=0) == 1
    assert sample(logits, SamplingParams(repetition_penalty=1.5), position=0, path=[1, 1]) == 3


def test_ties_at_the_edge_of_top_k_go_to_the_lower_id():
    logits = np.array([1, 1, 2, 1], dtype=np.float32)
    assert survivors(logits, SamplingParams(temperature=1.0, top_k=2), [])[0].tolist() == [2, 0]


def test_the_likeliest_token_always_survives():
    logits = np.array([5.0, 0.0], dtype=np.float32)
    params = SamplingParams(temperature=1.0, top_p=1e-6, min_p=1.0)
    assert survivors(logits, params, [])[0].tolist() == [0]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="position 4 are not finite"):
        sample(np.array([0, np.nan], dtype=np.float32), SamplingParams(), position=4)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_values_out_of_range_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)


def test_more_tokens_than_the_library_counts_are_all_of_them():
    logits = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    runtime = Runtime(1)
    for seed in range(5):
        every, huge = (SamplingParams(temperature=1.0, top_k=top_k, seed=seed) for top_k in (0, 2**64 + 1))
        assert sample_native(runtime, logits, huge, position=3) == sample_native(runtime, logits, every, position=3)
