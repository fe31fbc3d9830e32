"""SmoothQuant by llmcompressor: its scales against the formula, and what it saves on a model with outliers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.grids import QuantizedLayers, WeightGrid
from compress.layer_errors import measure_layers, smooth_as
from compress.load import load_float32
from compress.quality import measure
from compress.quantized_inputs import quantize_layers
from compress.recipes import load_model, read_grids, run_recipe
from compress.smoothquant import SmoothQuantRule, norm_weights, read_inputs, recipe_modifier, smooth, smoothquant
from compress.write import write_quantized
from deploy.formats.activations import ActivationGrid
from deploy.formats.model_dir import ModelDirectory

W8 = WeightGrid(8, None, symmetric=True)
W4 = WeightGrid(4, 32, symmetric=False)


def rule(weights: WeightGrid = W8, bits: int = 8, scope: str = "token", solver: str = "rtn") -> SmoothQuantRule:
    activations = ActivationGrid(bits, scope)  # type: ignore[arg-type]
    return SmoothQuantRule(weights, activations, solver, "memoryless_minmax", 0.01, True, "error")  # type: ignore[arg-type]


def quantized(
    directory: Path,
    samples: list[list[int]],
    how: SmoothQuantRule,
    alphas: tuple[float, ...] = (0.5,),
    finished: Path | None = None,
) -> QuantizedLayers:
    return smoothquant(
        directory,
        samples,
        how,
        alphas=alphas,
        choice_samples=samples[:2],
        on_layers=lambda num_layers: None,
        finished=finished,
    )


def divergence(directory: Path, layers: QuantizedLayers, samples: list[list[int]], out: Path) -> float:
    write_quantized(directory, layers.layers, out, inputs=layers.inputs, norms=layers.norms)
    quality, _ = measure(load_float32(directory), load_float32(out), samples)
    return quality.kl


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers")
    tiny.with_outliers().bfloat16().float().save_pretrained(path)
    tiny.tokenizer(path)
    return path


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 271) for _ in range(length)] for length in (61, 40, 57, 64)]


def test_blocks_of_another_strength_are_not_taken(directory: Path, samples: list[list[int]], tmp_path: Path) -> None:
    how = rule(W4, solver="gptq")
    weak, strong = (quantized(directory, samples, how, (alpha,)) for alpha in (0.2, 0.8))
    for alpha, whole in ((0.2, weak), (0.8, strong), (0.2, weak)):
        found = quantized(directory, samples, how, (alpha,), finished=tmp_path)
        for name, weight in whole.layers.items():
            np.testing.assert_array_equal(found.layers[name].q, weight.q, err_msg=name)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_scales_are_the_formulas(directory: Path, samples: list[list[int]], alpha: float) -> None:
    before: Any = load_model(directory).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    norms = [f"model.layers.{i}.{kind}_layernorm" for i in range(2) for kind in ("input", "post_attention")]
    for name in norms:
        before.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.setdefault(name, []).append(output[0])
        )
    after: Any = load_model(directory)
    smooth(after, samples, alpha)
    with torch.inference_mode():
        for sample in samples:
            before(torch.tensor([sample]))
    for name in norms:
        x = torch.cat(seen[name])
        parent, _, kind = name.rpartition(".")
        readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if kind != "input_layernorm":
            readers = ("mlp.gate_proj", "mlp.up_proj")
        # Layers behind the first see inputs that smoothing did not change, but for rounding.
        weights = torch.cat([before.get_submodule(f"{parent}.{reader}").weight for reader in readers])
        s = (x.amax(0) - x.amin(0)) ** alpha / (2 * weights.abs().amax(0)) ** (1 - alpha)
        torch.testing.assert_close(
            before.get_submodule(name).weight / s, after.get_submodule(name).weight, rtol=1e-3, atol=1e-6
        )
        for reader in readers:
            mine = before.get_submodule(f"{parent}.{reader}").weight * s
            torch.testing.assert_close(mine, after.get_submodule(f"{parent}.{reader}").weight, rtol=1e-3, atol=1e-6)


def test_a_smoothed_model_computes_what_it_did(
    directory: Path, samples: list[list[int]], ids: Callable[..., torch.Tensor]
) -> None:
    model, again, plain = (load_model(directory).eval() for _ in range(3))
    smooth(model, samples, 0.6)
    smooth_as(again, norm_weights(model))
    with torch.inference_mode():
        for other in (model, again):
            torch.testing.assert_close(other(ids(2, 19)).logits, plain(ids(2, 19)).logits, rtol=1e-3, atol=1e-3)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("weights", "bits"), [(W8, 8), (W4, 8)], ids=["W8A8", "W4A8"])
def test_outliers_break_a_scale_for_each_layer_but_not_a_smoothed_one(
    directory: Path, samples: list[list[int]], tmp_path: Path, weights: WeightGrid, bits: int
) -> None:
    how = rule(weights, bits, "tensor", "gptq")
    model = load_model(directory)
    run_recipe(model, recipe_modifier(how, "gptq"), samples)
    plain = QuantizedLayers(read_grids(model), inputs=read_inputs(model, how.activations))
    smoothed = quantized(directory, samples, how, (0.6,))
    worse = divergence(directory, plain, samples, tmp_path / "plain")
    better = divergence(directory, smoothed, samples, tmp_path / "smoothed")
    assert better < worse / 2


def test_static_scales_hold_the_calibrated_inputs(directory: Path, samples: list[list[int]]) -> None:
    found = quantized(directory, samples, rule(scope="tensor"))
    target = load_float32(directory)
    smooth_as(target, found.norms)
    errors = measure_layers(target, found.layers, found.inputs, samples)
    assert len(errors) == 14
    for name, error in errors.items():
        assert error.saturation is not None and error.saturation < 1e-3, name
        assert error.error < 0.05, name


@pytest.mark.parametrize("scope", ["token", "tensor"])
@pytest.mark.parametrize("weights", [W8, W4], ids=["W8A8", "W4A8"])
def test_the_written_model_is_the_one_in_memory(
    directory: Path,
    samples: list[list[int]],
    tmp_path: Path,
    ids: Callable[..., torch.Tensor],
    scope: str,
    weights: WeightGrid,
) -> None:
    found = quantized(directory, samples, rule(weights, 8, scope))
    write_quantized(directory, found.layers, tmp_path, inputs=found.inputs, norms=found.norms)
    model = load_model(directory).eval()
    for name, value in found.norms.items():
        model.get_parameter(name).data.copy_(torch.from_numpy(value))
    quantize_layers(model, found.layers, found.inputs)
    with torch.inference_mode():
        assert torch.equal(load_float32(tmp_path)(ids(2, 19)).logits, model(ids(2, 19)).logits)
    with ModelDirectory.open(tmp_path) as files:
        inputs = files.inputs("model.layers.1.mlp.down_proj")
        assert inputs is not None and inputs.grid == ActivationGrid(8, scope)  # type: ignore[arg-type]


def test_the_strength_with_the_least_divergence_is_taken(directory: Path, samples: list[list[int]]) -> None:
    notes = quantized(directory, samples, rule(scope="tensor"), (0.0, 0.6, 1.0)).notes
    assert set(notes["alpha_kl"]) == {"0.0", "0.6", "1.0"}
    assert notes["alpha_kl"][str(notes["alpha"])] == min(notes["alpha_kl"].values())


def test_a_single_strength_is_taken_without_measuring(directory: Path, samples: list[list[int]]) -> None:
    assert quantized(directory, samples, rule()).notes == {"alpha": 0.5, "alpha_kl": {}}


def test_two_runs_give_the_same_bits(directory: Path, samples: list[list[int]]) -> None:
    first, second = (quantized(directory, samples, rule(W4, solver="gptq")) for _ in range(2))
    for name, weight in first.layers.items():
        np.testing.assert_array_equal(weight.q, second.layers[name].q, err_msg=name)
    for name, norm in first.norms.items():
        np.testing.assert_array_equal(norm, second.norms[name], err_msg=name)


@pytest.mark.parametrize("scope", ["token", "tensor"])
def test_samples_that_teach_nothing_need_not_be_run(directory: Path, samples: list[list[int]], scope: str) -> None:
    found = quantized(directory, samples, rule(scope=scope))
    model = load_model(directory)
    smooth(model, samples, 0.5)
    run_recipe(model, recipe_modifier(rule(scope=scope), "rtn"), samples)
    for name, weight in read_grids(model).items():
        np.testing.assert_array_equal(found.layers[name].q, weight.q, err_msg=name)
        np.testing.assert_array_equal(found.layers[name].scale, weight.scale, err_msg=name)
    for name, inputs in read_inputs(model, rule(scope=scope).activations).items():
        assert found.inputs[name].equals(inputs)
        assert (inputs.scale is None) == (scope == "token")
