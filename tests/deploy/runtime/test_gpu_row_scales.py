"""The GPU backend on models whose files quantize inputs: layer by layer, and as a whole.

That a row does not depend on its surroundings is tested in test_backend.py.
"""

import numpy as np
import pytest
import torch

from deploy.formats.activations import ActivationGrid
from deploy.formats.bundle import Bundle
from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors
from deploy.kernels.gpu.w4a8 import W4Channel
from deploy.kernels.gpu.w4a16 import W4
from deploy.kernels.gpu.w8a8 import W8
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_weights import Matrix16, RowScaled
from deploy.runtime.modes import DraftOptions
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from tests.deploy.runtime.gpu_devices import (
    assert_near,
    assert_row_scaled_layers_equal_the_reference,
    pretend_gpu,
    torch_device,
)
from tests.deploy.runtime.rows import VOCABULARY, chain

TOKEN = ActivationGrid(8, "token")
EIGHT_BITS = [TOKEN, ActivationGrid(8, "tensor")]
# In deviations of the logits, about twice the largest seen. What rounds weights to bfloat16 is the farthest.
FINE = {"largest": 0.6, "mean": 0.06}
# Codes of 4 bits are coarse: noise of 2.5e-4 on what the reference's attention gives moves the reference's own logits
# by up to 1.2 deviations, 0.11 in the mean. Of such a model as a whole little more can be asked than that it agrees.
COARSE = {"largest": 2.0, "mean": 0.15}


def weight_of(matrix):
    assert isinstance(matrix, RowScaled)
    return type(matrix.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_mixed_model_is_the_reference_layer_by_layer(tmp_path, tiny, monkeypatch, model_type, dtype):
    path = tiny.model(tmp_path / "m", tiny.config(model_type), tiny.MIXED, seed=5)
    backend = GpuBackend.open(path, torch_device(dtype))
    first, second = backend.weights.layers
    assert {weight_of(layer.qkv) for layer in (first, second)} == {W4Channel}
    assert weight_of(first.output) == W8 and weight_of(first.gate_up) == Matrix16
    assert weight_of(first.down) == W4 and isinstance(second.gate_up, W4)
    assert weight_of(second.down) == W8  # 4 bits around other zero points
    rows = chain(np.random.default_rng(1).integers(0, VOCABULARY, 9))
    assert assert_row_scaled_layers_equal_the_reference(backend, path, rows, monkeypatch) == (5, 2)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_of_a_mixed_model_are_near_the_references(tmp_path, tiny, model_type):
    path = tiny.model(tmp_path / "m", tiny.config(model_type), tiny.MIXED, seed=5)
    backend, reference = GpuBackend.open(path, torch_device()), ReferenceBackend(path, activations="bf16")
    rows = chain(np.random.default_rng(1).integers(0, VOCABULARY, 60))
    assert_near(backend.forward(rows).logits, reference.forward(rows).logits, **COARSE)


@pytest.mark.parametrize("grid", EIGHT_BITS, ids=lambda grid: grid.scope)
@pytest.mark.parametrize(
    ("bits", "group_size", "form"),
    [
        (8, None, "symmetric"),
        (4, None, "symmetric"),
        (4, None, "asymmetric"),
        (8, 32, "symmetric"),
        (4, 32, "minimum"),
    ],
)
def test_logits_of_models_of_one_kind_are_near_the_references(tmp_path, tiny, bits, group_size, form, grid):
    """What SmoothQuant makes: 8-bit inputs."""
    kind = tiny.Quantized(bits, group_size, form, grid)
    path = tiny.model(tmp_path / "m", tiny.config("qwen3"), kind, seed=5)
    backend, reference = GpuBackend.open(path, torch_device()), ReferenceBackend(path, activations="bf16")
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 60)
    for begin, end in ((0, 40), (40, 41), (41, 60)):
        rows = chain(tokens[begin:end], begin)
        found, expected = (each.forward(rows) for each in (backend, reference))
        assert_near(found.logits, expected.logits, **FINE)
        for each in (backend, reference):
            each.keep(0, range(len(rows)))


@pytest.mark.parametrize(
    ("key_layers", "weight"),
    [((8, None, "symmetric"), W8), ((4, None, "asymmetric"), W8), ((4, 32, "asymmetric"), Matrix16)],
)
def test_layers_side_by_side_may_differ_in_their_weights(tmp_path, tiny, monkeypatch, key_layers, weight):
    kinds = {"k_proj": tiny.Quantized(*key_layers, TOKEN), "[qv]_proj": tiny.Quantized(4, None, "symmetric", TOKEN)}
    path = tiny.model(tmp_path / "m", tiny.config("qwen2"), kinds)
    backend = GpuBackend.open(path, torch_device())
    assert weight_of(backend.weights.layers[0].qkv) == weight
    found = assert_row_scaled_layers_equal_the_reference(backend, path, chain([3, 4, 5]), monkeypatch)
    assert found == ((2, 0) if weight == W8 else (0, 2))


def test_weights_of_8_bits_far_from_their_zero_point_become_16_bits(tmp_path, tiny, monkeypatch):
    """code − zero point needs 9 bits, which bfloat16 and float16 hold."""
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized(8, None, "asymmetric", TOKEN))
    backend = GpuBackend.open(path, torch_device())
    assert weight_of(backend.weights.layers[0].qkv) == Matrix16
    assert assert_row_scaled_layers_equal_the_reference(backend, path, chain([3, 4]), monkeypatch) == (0, 8)


def test_a_bundles_answers_are_the_same_in_every_mode(tmp_path, tiny, monkeypatch):
    pretend_gpu(monkeypatch, torch_device())
    bundle = Bundle.open(tiny.bundle_with_head(tmp_path / "b", tiny.MIXED))
    for sampling in (SamplingParams(), SamplingParams(0.9, top_p=0.95, repetition_penalty=1.1, seed=4)):
        answers = []
        for mode, drafts in (("plain", None), ("eagle-tree", DraftOptions(depth=3, width=2, num_nodes=6))):
            session = Session.open(bundle, mode=mode, drafts=drafts, backend="gpu")
            prompt = session.encode_raw("One and one and")
            answers.append(session.generate(prompt, GenerationOptions(10, sampling)).token_ids)
        assert answers[0] == answers[1]


def test_its_weights_have_the_size_that_is_told(tmp_path, tiny):
    """Integer kernels keep 4 and 8 bits a weight."""
    sizes = {}
    for bits in (4, 8):
        kind = tiny.Quantized(bits, None, "symmetric", TOKEN)
        sizes[bits] = GpuBackend.open(
            tiny.model(tmp_path / str(bits), tiny.config(), kind), torch_device()
        ).weight_bytes
    numbers = 2 * (96 * (96 + 2 * 32) + 96 * 96 + 3 * 96 * 160)
    assert numbers < sizes[8] - VOCABULARY * 96 * 2 < 1.15 * numbers
    # Inputs come in whole blocks of 128, here 96 and 160.
    assert numbers / 2 < sizes[4] - VOCABULARY * 96 * 2 < 0.85 * numbers


@pytest.mark.parametrize(
    ("suffix", "values", "message"),
    [
        ("input_scale", np.zeros(1, np.float32), "input_scale' is .*one positive number"),
        ("input_scale", np.full(1, 0.25, np.float32), "q_proj' and .* read the same rows, but quantize them different"),
        ("input_flatten", np.arange(128, dtype=np.int32), "names 128 channels, expected 96"),
        ("input_flatten", np.full(128, 1 << 30, dtype=np.int32), "every channel in order"),
    ],
)
def test_a_hostile_file_is_refused_before_anything_is_computed(tmp_path, tiny, suffix, values, message):
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.MIXED)
    with SafetensorsFile(path / "model.safetensors") as file:
        tensors = {
            name: BFloat16(file.array(name).copy()) if file.dtype(name) == "BF16" else file.array(name).copy()
            for name in file.names()
        }
    tensors[f"model.layers.0.self_attn.q_proj.{suffix}"] = values
    write_safetensors(path / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=message):
        GpuBackend.open(path, torch_device())
