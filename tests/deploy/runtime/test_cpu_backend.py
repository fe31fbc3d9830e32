"""The native backend against the reference, logits and taps bit for bit; what every backend does: test_backend.py."""

import time

import numpy as np
import pytest

from deploy.kernels.cpu.library import PHASES
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams
from tests.deploy.runtime.rows import (
    MODELS,
    VOCABULARY,
    assert_equal_forward,
    chain,
    fill,
    interleaved_trees,
    keep_random_paths,
    random_tree,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    """A model with QK norm and several groups of queries."""
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory)


@pytest.mark.parametrize(("model_type", "changes", "packing"), MODELS)
def test_logits_and_taps_are_the_references(isa, tmp_path, tiny, model_type, changes, packing):
    config = tiny.config(model_type, **changes)
    path = tiny.model(tmp_path / "m", config, packing and tiny.Quantized(*packing), seed=5)
    backend, reference = CpuBackend(path, threads=2), ReferenceBackend(path)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config["vocab_size"], 75)
    for begin, end in ((0, 41), (41, 42), (42, 75)):
        rows = chain(tokens[begin:end], begin)
        assert_equal_forward(backend.forward(rows, taps=(0, 1, 2)), reference.forward(rows, taps=(0, 1, 2)))
        backend.keep(0, range(len(rows)))
        reference.keep(0, range(len(rows)))


def test_mixed_packings_in_one_model_are_the_references(isa, tmp_path, tiny):
    """Plain layers beside packed ones: what one file's layers share is not assumed."""
    path = tiny.model(tmp_path / "plain", tiny.config("llama"), None)
    rows = chain(range(20))
    assert_equal_forward(CpuBackend(path).forward(rows), ReferenceBackend(path).forward(rows))


def test_a_random_tree_is_the_references(isa, directory, reference):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(2)
    for count, length in ((1, 0), (7, 3), (40, 31), (25, 64), (33, 70)):
        tokens = rng.integers(0, VOCABULARY, length)
        fill(backend, tokens)
        fill(reference, tokens)
        rows = random_tree(rng, count, length)
        assert_equal_forward(backend.forward(rows, taps=[1]), reference.forward(rows, taps=[1]))


def test_trees_of_many_sequences_in_one_call_are_the_references(isa, directory, reference):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(4)
    lengths = {0: 0, 5: 17, -3: 40, 1 << 40: 33}
    for sequence, length in lengths.items():
        tokens = rng.integers(0, VOCABULARY, length)
        fill(backend, tokens, sequence)
        fill(reference, tokens, sequence)
    rows = interleaved_trees(rng, lengths, 9)
    assert_equal_forward(backend.forward(rows), reference.forward(rows))
    for sequence in lengths:
        reference.reset(sequence)


def test_what_follows_kept_paths_is_the_references(isa, directory, reference):
    backend = CpuBackend(directory, threads=2)
    kept = [keep_random_paths(each, np.random.default_rng(8)) for each in (backend, reference)]
    assert kept[0] == kept[1]
    probe = [Row(1, len(kept[0]))]
    assert_equal_forward(backend.forward(probe), reference.forward(probe))
    penalized = SamplingParams(repetition_penalty=3.0)
    assert backend.forward_tokens(probe, penalized) == reference.forward_tokens(probe, penalized)
    reference.reset(0)


def test_memory_that_other_sequences_gave_back_changes_nothing(directory):
    rng = np.random.default_rng(31)
    texts = {sequence: rng.integers(0, VOCABULARY, 100).tolist() for sequence in range(80)}
    model, fresh = CpuBackend(directory), CpuBackend(directory)
    for sequence, tokens in texts.items():
        fill(model, tokens, sequence)
    held = model.cache_bytes
    for sequence in range(0, 80, 2):
        model.reset(sequence)
    assert model.cache_bytes == held // 2
    texts |= {100 + i: texts[0][: 50 + i] for i in range(20)}
    for sequence in range(100, 120):
        fill(model, texts[sequence], sequence)
    for sequence in (100, 119, 1, 41, 79):
        fill(fresh, texts[sequence], sequence)
        row = [Row(7, len(texts[sequence]), sequence)]
        np.testing.assert_array_equal(model.forward(row).logits, fresh.forward(row).logits)
    for sequence in texts:
        model.reset(sequence)
    assert model.cache_bytes == 0


def test_threads_change_nothing(isa, directory):
    rng = np.random.default_rng(7)
    rows = random_tree(rng, 29, 0)
    results = [CpuBackend(directory, threads=threads).forward(rows, taps=[0, 2]) for threads in (1, 2, 3)]
    assert_equal_forward(results[1], results[0])
    assert_equal_forward(results[2], results[0])


def test_no_threads_are_refused(directory):
    with pytest.raises(ValueError, match="threads=0"):
        CpuBackend(directory, threads=0)


def test_sizes_that_the_sums_do_not_fit_are_refused(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(hidden_size=80), None)
    with pytest.raises(ValueError, match="hidden_size=80 is not a multiple of 32"):
        CpuBackend(path)


def test_tokens_come_with_the_logits_that_they_are_chosen_from(directory):
    backend, rows = CpuBackend(directory), chain([5, 6, 7])
    params, wanted = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3), [0, 2]
    expected = backend.forward(rows, logit_rows=wanted).logits
    logits = np.empty_like(expected)
    found = backend.forward_tokens(rows, params, token_rows=wanted, logits=logits)
    assert np.array_equal(logits, expected)
    assert found.tokens == backend.forward_tokens(rows, params, token_rows=wanted).tokens
    for wrong in (logits.astype(np.float64), logits[:1], logits[:, :-1].copy()):
        with pytest.raises(ValueError, match=r"^logits is float.* it must be float32 \(2, 263\)"):
            backend.forward_tokens(rows, params, token_rows=wanted, logits=wrong)


def test_phases_are_timed_only_when_asked_for_and_change_nothing(directory):
    backend, rows, times = CpuBackend(directory), chain([5, 6, 7]), {}
    expected = backend.forward_tokens(rows, SamplingParams(temperature=1.0, seed=3)).tokens
    begin = time.perf_counter()
    with backend.phase_times(times):
        assert backend.forward_tokens(rows, SamplingParams(temperature=1.0, seed=3)).tokens == expected
    whole = time.perf_counter() - begin
    assert set(times) == set(PHASES)
    assert all(times[name] > 0 for name in ("qkv", "attention", "output", "mlp", "head", "sampling"))
    assert times["quantize"] == 0  # three rows: within the linear layers' phases
    assert 0 < sum(times.values()) < whole
    before = dict(times)
    backend.forward_tokens(rows, SamplingParams())
    with backend.phase_times(times):
        pass
    assert times == before
