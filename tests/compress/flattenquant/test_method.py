"""FlattenQuant as a whole on a model with outliers: what it saves, what is shared, what is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.flattenquant.choice import FlattenRule
from compress.flattenquant.method import SolverRule, flattenquant
from compress.grids import QuantizedLayers
from compress.layer_errors import measure_layers, smooth_as
from compress.load import load_float32
from compress.quality import measure
from compress.recipes import load_model
from compress.sites import input_sites
from compress.write import write_quantized
from deploy.formats.model_dir import ModelDirectory

SOLVER = SolverRule(True, "memoryless_mse", 0.01, True, "error")
ALL_4, ALL_8 = 10.0, 0.0


def rule(gamma: float, **changes: Any) -> FlattenRule:
    fields: dict[str, Any] = {"beta": 1.3, "max_expansion": 1.6, "criterion": "error", "group_size": None}
    return FlattenRule(gamma=gamma, **(fields | changes))


def quantized(
    directory: Path, samples: list[list[int]], how: FlattenRule, alpha: float | None = None
) -> QuantizedLayers:
    return flattenquant(directory, samples, how, SOLVER, alpha=alpha, on_layers=lambda num_layers: None)


def divergence(directory: Path, layers: QuantizedLayers, samples: list[list[int]], out: Path) -> float:
    write_quantized(directory, layers.layers, out, inputs=layers.inputs, norms=layers.norms)
    quality, _ = measure(load_float32(directory), load_float32(out), samples)
    return quality.kl


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers")
    tiny.with_outliers(model_type="qwen2").bfloat16().float().save_pretrained(path)  # qwen2: with biases
    tiny.tokenizer(path)
    return path


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 271) for _ in range(length)] for length in (61, 40, 57, 64, 50)]


@pytest.fixture(scope="module")
def found(directory: Path, samples: list[list[int]]) -> QuantizedLayers:
    return quantized(directory, samples, rule(ALL_4))


def test_4_bit_inputs_break_a_model_with_outliers_but_not_a_flattened_one(
    directory: Path, samples: list[list[int]], found: QuantizedLayers, tmp_path: Path
) -> None:
    plain = quantized(directory, samples, rule(ALL_4, max_expansion=1.0))
    for name, inputs in plain.inputs.items():
        assert inputs.flatten is not None and len(inputs.flatten) <= {"down_proj": 160}.get(name.split(".")[-1], 96)
    assert divergence(directory, found, samples, tmp_path / "ours") < 0.5 * divergence(
        directory, plain, samples, tmp_path / "plain"
    )


def test_input_errors_are_at_least_halved_where_there_are_outliers(
    directory: Path, samples: list[list[int]], found: QuantizedLayers
) -> None:
    plain = quantized(directory, samples, rule(ALL_4, max_expansion=1.0))
    target = load_float32(directory)
    ours, theirs = (measure_layers(target, each.layers, each.inputs, samples) for each in (found, plain))
    for name in ours:
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert ours[name].error < theirs[name].error / 2, name


def test_layers_of_one_input_share_index_scale_and_bits(found: QuantizedLayers) -> None:
    for first, *others in input_sites(found.layers):
        for name in others:
            assert found.inputs[first].equals(found.inputs[name])
            assert found.layers[first].bits == found.layers[name].bits
            assert found.layers[name].shape[1] == found.layers[first].shape[1]


def test_gamma_decides_how_many_layers_have_4_bits(directory: Path, samples: list[list[int]]) -> None:
    eight = quantized(directory, samples, rule(ALL_8))
    errors = sorted({choice["error_4"] for choice in eight.notes["choice"].values()})
    middle = quantized(directory, samples, rule(errors[len(errors) // 2]))
    assert {weight.bits for weight in eight.layers.values()} == {8}
    assert {weight.bits for weight in middle.layers.values()} == {4, 8}
    for name, weight in middle.layers.items():
        choice = middle.notes["choice"][name]
        assert weight.bits == middle.inputs[name].grid.bits == choice["bits"]
        assert (choice["error_4"] < errors[len(errors) // 2]) == (choice["bits"] == 4)


def test_columns_that_calibration_never_filled_keep_their_weights(found: QuantizedLayers, directory: Path) -> None:
    target: Any = load_float32(directory)
    for name, inputs in found.inputs.items():
        assert inputs.flatten is not None
        weight = found.layers[name].dequantize()
        original = target.get_submodule(name).weight.detach().numpy()[:, inputs.flatten]
        step = found.layers[name].scale
        lasts = [place for place in np.flatnonzero(inputs.copies()) if np.abs(original[:, place]).max() > step.max()]
        for place in lasts:
            assert np.abs(weight[:, place]).max() > 0, (name, place)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_flattened_model_is_read_back_as_it_was_decided(
    directory: Path, samples: list[list[int]], tmp_path: Path, group_size: int | None, alpha: float | None
) -> None:
    layers = quantized(directory, samples, rule(0.12, group_size=group_size), alpha)
    assert bool(layers.norms) == (alpha is not None)
    assert divergence(directory, layers, samples, tmp_path) < 0.5
    with ModelDirectory.open(tmp_path) as files:
        for name, inputs in layers.inputs.items():
            read, weight = files.inputs(name), files.linear(name)
            assert read is not None and read.equals(inputs)
            assert weight.shape == layers.layers[name].shape
            assert weight.bits == layers.layers[name].bits  # type: ignore[union-attr]


def test_8_bits_everywhere_lose_little(
    directory: Path, samples: list[list[int]], ids: Callable[..., torch.Tensor]
) -> None:
    layers = quantized(directory, samples, rule(ALL_8))
    target = load_model(directory).eval()
    smooth_as(target, layers.norms)
    for name, error in measure_layers(target, layers.layers, layers.inputs, samples).items():
        assert error.error < 0.03, name
        assert error.saturation == 0.0, name


def test_two_runs_give_the_same_bits(directory: Path, samples: list[list[int]], found: QuantizedLayers) -> None:
    again = quantized(directory, samples, rule(ALL_4))
    for name, weight in found.layers.items():
        np.testing.assert_array_equal(again.layers[name].q, weight.q, err_msg=name)
        assert again.inputs[name].equals(found.inputs[name])
