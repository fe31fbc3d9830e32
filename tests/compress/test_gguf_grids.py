"""A GGUF's own grids: code for code what gguf's reference dequantizes, in Hugging Face row order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from compress.gguf_grids import LOSSY_REGRID, keep, q4_0
from compress.grids import QuantizedLayers
from compress.target.gguf_source import GgufFile
from deploy.formats.architectures import ModelShape, linear_layers
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16

WIDE = {"hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 1}


def kept(model: Any, tmp_path: Path) -> QuantizedLayers:
    names = [layer.name for layer in linear_layers(ModelShape.from_config(model.shape.config()))]
    return keep(GgufFile(model.write(tmp_path / "model.gguf")), names, model.shape.layers)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_kept_weights_are_exactly_what_the_file_stood_for(
    tiny: Any, tmp_path: Path, architecture: str, kind: Kind
) -> None:
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = tiny.Gguf(shape=tiny.Shape(architecture), kinds=dict.fromkeys(linear, kind))
    found, expected = kept(model, tmp_path), model.expected()
    assert found.fallbacks == {}
    assert len(found.layers) == 14
    for name, weight in found.layers.items():
        np.testing.assert_array_equal(weight.dequantize(), expected[f"{name}.weight"], err_msg=name)
        assert weight.bits == (8 if kind is Kind.Q8_0 else 4)


def random_q4_k(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Q4_K blocks with every byte random but for finite scales."""
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    halves = rng.uniform(-0.02, 0.02, (rows, columns // 256, 2)).astype(np.float16)
    blocks[..., :4] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


def test_random_q4_k_blocks_are_kept_exactly(tiny: Any, tmp_path: Path) -> None:
    rng, shape = np.random.default_rng(3), tiny.Shape(**WIDE)
    sizes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "mlp.down_proj": (256, 512)}
    raw = {f"model.layers.0.{name}.weight": random_q4_k(rng, *size) for name, size in sizes.items()}
    kinds = dict.fromkeys(("q_proj", "k_proj", "down_proj"), Kind.Q4_K)
    found = kept(tiny.Gguf(shape=shape, kinds=kinds, raw=raw), tmp_path)
    assert sorted(found.layers) == sorted(name.removesuffix(".weight") for name in raw)
    for name, blocks in raw.items():
        weight = found.layers[name.removesuffix(".weight")].dequantize()
        expected = dequantize(blocks, Kind.Q4_K)
        np.testing.assert_array_equal(tiny.to_gguf_order(shape, name, weight), expected, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1, Kind.Q6_K])
def test_other_types_go_to_int8_within_half_a_step_and_are_counted(tiny: Any, tmp_path: Path, kind: Kind) -> None:
    rng, shape = np.random.default_rng(7), tiny.Shape(**WIDE)
    name = "model.layers.0.self_attn.q_proj"
    if kind is Kind.Q6_K:
        raw = rng.integers(0, 256, (256, 210), dtype=np.uint8)
        raw[:, 208:] = rng.uniform(-0.01, 0.01, (256, 1)).astype(np.float16).view(np.uint8)
    else:
        raw = quantize(rng.standard_normal((256, 256)).astype(np.float32), kind)
    found = kept(tiny.Gguf(shape=shape, kinds={"q_proj": kind}, raw={f"{name}.weight": raw}), tmp_path)
    assert found.fallbacks == {LOSSY_REGRID: [name]}
    weight = found.layers[name]
    assert weight.bits == 8
    exact = dequantize(raw, kind).astype(np.float32)
    got = tiny.to_gguf_order(shape, f"{name}.weight", weight.dequantize())
    step = np.abs(exact.reshape(256, 8, 32)).max(-1, keepdims=True) / 127
    # bfloat16 keeps 8 bits of the step: the extreme code may then be clipped by 1/256 of 127 steps.
    error = np.abs(got - exact).reshape(256, 8, 32) / step
    assert error.max() <= 0.5 + 127 / 256
    assert np.quantile(error, 0.95) <= 0.5 * (1 + 1 / 256)


def test_layers_in_full_precision_are_left_as_they_are(tiny: Any, tmp_path: Path) -> None:
    found = kept(tiny.Gguf(kinds={"q_proj": Kind.Q4_0, "k_proj": Kind.F16, "v_proj": Kind.BF16}), tmp_path)
    assert {name.split(".")[-1] for name in found.layers} == {"q_proj"}
    assert found.fallbacks == {}


@pytest.mark.parametrize("shape", [(17, 96), (5, 32), (3, 224)])
def test_q4_0_is_ggufs_own(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    weight[0, :32] = 0
    expected = dequantize(quantize(weight, Kind.Q4_0), Kind.Q4_0)
    found = q4_0(weight)
    np.testing.assert_array_equal(found.dequantize(), expected)
    assert (found.bits, found.group_size) == (4, 32)
    assert found.zero_point is not None
    assert np.all(found.zero_point == 8)


def test_q4_0_rounds_within_half_a_step_of_its_signed_extreme() -> None:
    weight = np.random.default_rng(2).standard_normal((7, 64)).astype(np.float32)
    grouped = weight.reshape(7, 2, 32)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1)
    error = np.abs(q4_0(weight).dequantize() - weight).reshape(7, 2, 32)
    # Values opposite to the extreme reach code 15 only, a whole step short of it.
    assert np.all(error <= np.abs(extreme / 8) * 1.002)


def test_float_minima_are_stored_as_the_file_has_them(tiny: Any, tmp_path: Path) -> None:
    found = kept(tiny.Gguf(kinds={"down_proj": Kind.Q4_1}), tmp_path)
    for weight in found.layers.values():
        assert weight.zero_point is None
        np.testing.assert_array_equal(weight.minimum, weight.minimum.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(weight.scale, weight.scale.astype(np.float16).astype(np.float32))


def test_int8_scales_fit_bfloat16(tiny: Any, tmp_path: Path) -> None:
    found = kept(tiny.Gguf(kinds={"up_proj": Kind.Q5_1}), tmp_path)
    for weight in found.layers.values():
        np.testing.assert_array_equal(from_bfloat16(to_bfloat16(weight.scale)), weight.scale)
