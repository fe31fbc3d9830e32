"""Native models whose files quantize inputs against the reference, bit for bit; against themselves: test_backend.py."""

import numpy as np
import pytest

from deploy.formats.activations import ActivationGrid
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.cpu_backend import CpuBackend
from tests.deploy.runtime.rows import VOCABULARY, assert_equal_forward, chain, fill, forward_in_chunks, random_tree

GRIDS = [ActivationGrid(bits, scope) for bits in (4, 8) for scope in ("tensor", "token")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.MIXED)


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}),
        ("qwen3", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 10, "intermediate_size": 2240}),
    ],
)
def test_a_mixed_model_is_the_reference(isa, tmp_path, tiny, model_type, changes):
    path = tiny.model(tmp_path / "m", tiny.config(model_type, **changes), tiny.MIXED, seed=5)
    backend, reference = CpuBackend(path, threads=2), ReferenceBackend(path)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 75)
    for begin, end in ((0, 41), (41, 42), (42, 50), (50, 75)):
        rows = chain(tokens[begin:end], begin)
        assert_equal_forward(backend.forward(rows, taps=(0, 1, 2)), reference.forward(rows, taps=(0, 1, 2)))
        backend.keep(0, range(len(rows)))
        reference.keep(0, range(len(rows)))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.scope}")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_one_kind_is_the_reference(tmp_path, tiny, bits, grid):
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized(bits, None, "symmetric", grid))
    rows = chain(range(20))
    assert_equal_forward(CpuBackend(path).forward(rows), ReferenceBackend(path).forward(rows))


def test_a_tree_is_the_references(isa, directory, reference):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(3)
    context = rng.integers(0, VOCABULARY, 30)
    rows = random_tree(rng, 20, 30)
    for model in (backend, reference):
        fill(model, context)
    assert_equal_forward(backend.forward(rows), reference.forward(rows))


def test_threads_and_chunks_change_nothing(isa, directory):
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, 100)
    expected = CpuBackend(directory, threads=1).forward(chain(tokens)).logits
    backend = CpuBackend(directory, threads=3)
    for sizes in ((100,), (1, 99), (9, 8, 50, 33), (1,) * 100):
        np.testing.assert_array_equal(forward_in_chunks(backend, tokens, sizes), expected)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (("gate",), ("up", 8, None, "symmetric", ActivationGrid(8, "token"))),
        (("k_proj", 4, None, "symmetric", ActivationGrid(4, "token")), ("q_proj|v_proj", 4, 32, "symmetric", GRIDS[3])),
    ],
)
def test_layers_that_disagree_about_a_row_are_refused_natively_too(tmp_path, tiny, monkeypatch, kind, other):
    """The library reads one form of a row for all of them; it does not rely on the file's reader."""
    monkeypatch.setattr(ModelDirectory, "_check_shared_inputs", lambda self: None)
    kinds = {pattern: tiny.Quantized(*form) for pattern, *form in (kind, other)}
    with pytest.raises(RuntimeError, match="quantize their inputs differently"):
        CpuBackend(tiny.model(tmp_path / "m", tiny.config(), kinds))
