"""A written artifact, read by us and by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.gguf_grids import q4_0
from compress.load import load_float32, replace_weights
from compress.write import stored_bits_per_weight, write_quantized
from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.architectures import linear_layers
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16

Maker = Callable[[np.random.Generator, np.ndarray], GroupedInt]


def grid(bits: int, group_size: int, *, symmetric: bool) -> Maker:
    """Rounds to a grid written out here, with scales in bfloat16."""

    def make(rng: np.random.Generator, weight: np.ndarray) -> GroupedInt:
        rows, columns = weight.shape
        grouped, top = weight.reshape(rows, -1, group_size), (1 << bits) - 1
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        span = 2 * np.abs(grouped).max(-1) if symmetric else high - low
        scale = from_bfloat16(to_bfloat16((span / top).astype(np.float32)))
        zero = np.full(scale.shape, 1 << (bits - 1)) if symmetric else np.clip(np.rint(-low / scale), 0, top)
        codes = np.clip(np.rint(grouped / scale[..., None]) + zero[..., None], 0, top).astype(np.uint8)
        return GroupedInt.from_zero_point(
            codes.reshape(rows, columns), scale, zero.astype(np.uint8), bits=bits, group_size=group_size
        )

    return make


def float_minima(rng: np.random.Generator, weight: np.ndarray) -> GroupedInt:
    rows, columns = weight.shape
    shape = (rows, columns // 32)
    scale, minimum = (
        rng.uniform(a, b, shape).astype(np.float16).astype(np.float32) for a, b in ((0.01, 0.02), (-0.2, 0))
    )
    return GroupedInt(rng.integers(0, 16, weight.shape, dtype=np.uint8), scale, minimum, 4, 32)


FORMS: dict[str, Maker] = {
    "asymmetric": grid(4, 32, symmetric=False),
    "symmetric": grid(4, 32, symmetric=True),
    "8-bit": grid(8, 32, symmetric=False),
    "8-bit symmetric": grid(8, 32, symmetric=True),
    "q4_0": lambda rng, weight: q4_0(weight),
}


def quantize(target: Path, choose: Callable[[str], Maker | None]) -> dict[str, GroupedInt]:
    """choose: a layer's name → how it is quantized, or None to leave it."""
    rng, layers = np.random.default_rng(1), {}
    with ModelDirectory.open(target) as files:
        for layer in linear_layers(files.shape):
            if (make := choose(layer.name)) is not None:
                layers[layer.name] = make(rng, files.float32(f"{layer.name}.weight"))
    return layers


@pytest.fixture(scope="module")
def target(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("target"))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def assert_transformers_agrees(out: Path, ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = logits(theirs, ids)
    assert expected.dtype == torch.float32
    assert torch.equal(logits(load_float32(out), ids), expected)


@pytest.mark.parametrize("form", list(FORMS))
def test_transformers_loads_the_artifact_with_the_very_same_logits(
    target: Path, tmp_path: Path, ids: Callable[..., torch.Tensor], form: str
) -> None:
    write_quantized(target, quantize(target, lambda name: FORMS[form]), tmp_path / "out")
    assert_transformers_agrees(tmp_path / "out", ids(3, 17))


def by_kind(name: str) -> Maker | None:
    forms = {"q_proj": "asymmetric", "down_proj": "8-bit symmetric", "o_proj": "symmetric", "up_proj": "q4_0"}
    kind = name.split(".")[-1]
    return FORMS[forms[kind]] if kind in forms else None


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_mixed_precisions_and_untouched_layers_survive_in_every_architecture(
    tiny: Any, tmp_path: Path, ids: Callable[..., torch.Tensor], model_type: str, is_tied: bool
) -> None:
    target = tiny.directory(tmp_path / "target", model_type, tie_word_embeddings=is_tied)
    layers = quantize(target, by_kind)
    write_quantized(target, layers, tmp_path / "out")
    assert_transformers_agrees(tmp_path / "out", ids(2, 11))
    with ModelDirectory.open(tmp_path / "out") as files:
        for name, weight in layers.items():
            stored: Any = files.linear(name)
            np.testing.assert_array_equal(stored.q, weight.q)
            np.testing.assert_array_equal(stored.scale, weight.scale)


@pytest.mark.parametrize("form", list(FORMS))
def test_one_grid_for_some_layers_leaves_the_others_plain(
    target: Path, tmp_path: Path, ids: Callable[..., torch.Tensor], form: str
) -> None:
    layers = quantize(target, lambda name: FORMS[form] if "mlp" in name else None)
    write_quantized(target, layers, tmp_path / "out")
    assert_transformers_agrees(tmp_path / "out", ids(2, 11))


def test_reading_gives_the_weights_that_were_put_into_the_model(
    tiny: Any, target: Path, tmp_path: Path, ids: Callable[..., torch.Tensor]
) -> None:
    layers = quantize(target, lambda name: FORMS["asymmetric"])
    write_quantized(target, layers, tmp_path / "out")
    in_memory = load_float32(target)
    replace_weights(in_memory, layers)
    for name, tensor in in_memory.state_dict().items():  # the embedding and the norms go through bfloat16
        if name.removesuffix(".weight") not in layers:
            tensor.copy_(tensor.bfloat16().float())
    loaded = load_float32(tmp_path / "out").state_dict()
    for name, tensor in in_memory.state_dict().items():
        if tensor.ndim == 2:
            assert torch.equal(loaded[name], tensor), name
    assert logits(load_float32(tmp_path / "out"), ids(1, 5)).isfinite().all()


def test_float_minima_load_with_us_and_are_refused_by_transformers(
    target: Path, tmp_path: Path, ids: Callable[..., torch.Tensor]
) -> None:
    from transformers import AutoModelForCausalLM

    layers = quantize(target, lambda name: float_minima)
    write_quantized(target, layers, tmp_path / "out")
    loaded: Any = load_float32(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    weight = layers[name]
    expected = weight.q.reshape(96, 5, 32) * weight.scale[..., None] + weight.minimum[..., None]
    np.testing.assert_array_equal(loaded.get_submodule(name).weight.detach().numpy(), expected.reshape(96, 160))
    with pytest.raises(Exception, match="minimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_vectors_that_bfloat16_would_change_keep_their_precision(tiny: Any, tmp_path: Path) -> None:
    model = tiny.causal_lm()
    model.model.norm.weight.data.fill_(1 + 2**-20)
    model.save_pretrained(tmp_path / "target")
    write_quantized(tmp_path / "target", {}, tmp_path / "out")
    with ModelDirectory.open(tmp_path / "out") as files:
        assert files.dtype("model.norm.weight") == "F32"
        assert files.dtype("model.layers.0.input_layernorm.weight") == "BF16"
        assert files.float32("model.norm.weight")[0] == np.float32(1 + 2**-20)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(("form", "bits"), [("asymmetric", 4.625), ("symmetric", 4.5), ("8-bit", 8.75), ("q4_0", 4.5)])
def test_stored_bits_count_scales_and_zero_points(target: Path, form: str, bits: float) -> None:
    assert stored_bits_per_weight(quantize(target, lambda name: FORMS[form])) == pytest.approx(bits)


def test_stored_bits_agree_with_the_size_of_the_file(target: Path, tmp_path: Path) -> None:
    layers = quantize(target, lambda name: float_minima)
    write_quantized(target, layers, tmp_path / "out")
    with ModelDirectory.open(tmp_path / "out") as files:
        num_bytes = 0
        for name in files.names():
            if name.endswith(("weight_packed", "weight_scale", "weight_min", "weight_zero_point")):
                num_bytes += files._shards.array(name).nbytes
    count = sum(weight.q.size for weight in layers.values())
    assert stored_bits_per_weight(layers) == pytest.approx(8 * num_bytes / count)


def test_a_missing_tensor_is_named_when_loading(target: Path, tmp_path: Path) -> None:
    write_quantized(target, quantize(target, lambda name: FORMS["symmetric"]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.2"):
        load_float32(tmp_path / "out")


def test_columns_that_flattening_adds_are_bits_of_the_weights_that_they_repeat() -> None:
    codes, scale = np.zeros((6, 64), dtype=np.uint8), np.ones((6, 1), dtype=np.float32)
    weight = GroupedInt.from_zero_point(codes, scale, 8, bits=4, group_size=64)
    index = np.sort(np.append(np.arange(48), np.arange(16))).astype(np.int32)
    inputs = LayerInputs(ActivationGrid(4, "tensor"), 0.5, index)
    assert stored_bits_per_weight({"a": weight}) == 4 + 16 / 64
    assert stored_bits_per_weight({"a": weight}, {"a": inputs}) == (4 * 64 + 16) / 48
