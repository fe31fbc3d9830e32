"""The GPU backend, its operations in plain torch on CPU tensors: near the reference; what it asks of memory.

What every backend does is tested in test_backend.py.
"""

import numpy as np
import pytest
import torch

from deploy.formats.architectures import linear_layers
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.gpu_backend import GpuBackend
from tests.deploy.runtime.gpu_devices import assert_near, torch_device
from tests.deploy.runtime.rows import MODELS, VOCABULARY, chain, fill, random_tree


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    """A model with QK norm and several groups of queries."""
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())


@pytest.fixture
def backend(directory):
    return GpuBackend.open(directory, torch_device())


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory, activations="bf16")


# float16 is finer than the `bf16` form: it is compared with unrounded inputs
@pytest.mark.parametrize(("dtype", "form"), [(torch.bfloat16, "bf16"), (torch.float16, "float32")], ids=str)
@pytest.mark.parametrize(("model_type", "changes", "packing"), MODELS)
def test_logits_and_taps_are_near_the_references(tmp_path, tiny, model_type, changes, packing, dtype, form):
    config = tiny.config(model_type, **changes)
    path = tiny.model(tmp_path / "m", config, packing and tiny.Quantized(*packing), seed=5)
    backend, reference = GpuBackend.open(path, torch_device(dtype)), ReferenceBackend(path, activations=form)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 75)
    num_clear = 0
    for begin, end in ((0, 41), (41, 42), (42, 75)):
        rows = chain(tokens[begin:end], begin)
        found, expected = (each.forward(rows, taps=(0, 1, 2)) for each in (backend, reference))
        num_clear += assert_near(found.logits, expected.logits)
        for layer, values in expected.taps.items():
            assert np.abs(found.taps[layer] - values).max() <= 0.25 * values.std()
        for each in (backend, reference):
            each.keep(0, range(len(rows)))
    assert num_clear > 20


def test_a_tree_is_near_the_references(backend, reference):
    rng = np.random.default_rng(2)
    for count, length in ((1, 0), (7, 3), (40, 31), (25, 64)):
        tokens = rng.integers(0, VOCABULARY, length)
        rows = random_tree(rng, count, length)
        found = []
        for each in (backend, reference):
            fill(each, tokens)
            found.append(each.forward(rows).logits)
        assert_near(*found)
    reference.reset(0)


def test_states_stay_on_the_host_in_float32(directory):
    """What a drafter reads of the target, whatever the device computes in."""
    backend = GpuBackend.open(directory, torch_device(torch.float16))
    taps = backend.forward([Row(1, 0)], taps=[0, 2]).taps
    assert {values.dtype for values in taps.values()} == {np.dtype(np.float32)}


def test_slots_are_used_again(backend):
    """What is dropped, truncated or reset is free; so caches stay small."""
    fill(backend, range(60))
    before = backend.cache_bytes
    for i in range(25):
        backend.forward([Row(token, 60) for token in range(40)], logit_rows=[])
        backend.truncate(0, 60)
        fill(backend, range(50), 1 + i)
        backend.reset(1 + i)
    assert backend.cache_bytes == before


def test_sizes_that_no_kernel_knows_are_refused(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(head_dim=288, num_attention_heads=1, num_key_value_heads=1), None)
    with pytest.raises(ValueError, match="head_dim=288 is larger than the 256 that the GPU kernels know"):
        GpuBackend.open(path, torch_device())


def test_weights_and_caches_that_do_not_fit_are_told_with_a_remedy(directory, monkeypatch):
    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend = GpuBackend.open(directory, torch_device())
    with monkeypatch.context() as patched:
        patched.setattr("deploy.runtime.gpu_loader.pack_w4", full)
        with pytest.raises(MemoryError, match=r"m.*: its weights do not fit .*--device cpu"):
            GpuBackend.open(directory, torch_device())
        zeros = torch.zeros
        patched.setattr(torch, "zeros", lambda *a, **n: (full if n.get("dtype") == torch.float16 else zeros)(*a, **n))
        with pytest.raises(MemoryError, match=r"a cache of 1024 tokens needs 0\.0 GiB, more than the GPU has left"):
            for sequence in range(6):
                fill(backend, range(100), sequence)


def test_graphs_of_a_cache_that_could_not_grow_are_not_used_again(directory, monkeypatch):
    backend = GpuBackend.open(directory, torch_device())
    fill(backend, range(100))
    before, zeros, grown = backend._cache.generation, torch.zeros, []

    def small(*arguments, **named):
        if named.get("dtype") == torch.float16:
            grown.append(1)
            if len(grown) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", small)
        with pytest.raises(MemoryError):
            for sequence in range(1, 6):
                fill(backend, range(100), sequence)
    assert backend._cache.generation > before


def test_its_weights_have_the_size_that_is_told(directory):
    """4-bit codes, scales, one tied embedding of 16 bits; norms in fp32."""
    backend = GpuBackend.open(directory, torch_device())
    numbers = sum(layer.num_out * layer.num_in for layer in linear_layers(backend.shape))
    ends = VOCABULARY * 96 * 2
    groups = numbers // 32
    assert numbers // 2 + ends < backend.weight_bytes < numbers // 2 + ends + 4 * groups + 10_000
    assert backend.device_facts == {"gpu": "none"}
