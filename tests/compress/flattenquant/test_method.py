"""FlattenQuant as a whole on a model with outliers: what it saves, what is shared, what is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import SettingError
from compress.flattenquant import watcher as watcher_module
from compress.flattenquant.bits import BitsRule, Criterion
from compress.flattenquant.method import SolverRule, flattenquant, measure_sites
from compress.flattenquant.splits import FlattenRule
from compress.flattenquant.watcher import SiteWatcher
from compress.grids import QuantizedLayers
from compress.layer_errors import measure_layers, smooth_as
from compress.load import load_float32
from compress.quality import measure
from compress.recipes import load_model, run_recipe
from compress.sites import input_sites
from compress.write import write_quantized
from deploy.formats.model_dir import ModelDirectory

ALL_4, ALL_8 = BitsRule("error", None, 1.0), BitsRule("error", 0.0, None)


def rule(**changes: Any) -> FlattenRule:
    fields: dict[str, Any] = {
        "beta": 1.3,
        "threshold": "mean",
        "max_expansion": 1.6,
        "group_size": None,
        "symmetric": True,
        "observer": "memoryless_mse",
    }
    return FlattenRule(**(fields | changes))


def quantized(
    directory: Path,
    samples: list[list[int]],
    bits: BitsRule,
    how: FlattenRule | None = None,
    alpha: float | None = None,
    *,
    correct_inputs: bool = False,
    finished: Path | None = None,
    on_layers: Callable[[int], None] = lambda num_layers: None,
    **changes: Any,
) -> QuantizedLayers:
    fields = {"solver": "gptq", "dampening": 0.01, "activation_order": True, "on_singular": "error"}
    solver, how = SolverRule(correct_inputs=correct_inputs, **(fields | changes)), how or rule()
    with TemporaryDirectory() as sites:
        place = Path(sites)
        measure_sites(directory, samples, how, place, alpha=alpha, on_layers=silent)
        return flattenquant(
            directory, samples, how, place, bits, solver, alpha=alpha, on_layers=on_layers, finished=finished
        )


def silent(num_layers: int) -> None:
    """No progress."""


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


@dataclass(frozen=True)
class How:
    """The paper's threshold with plain GPTQ, or what configurations have by default."""

    threshold: str
    correct_inputs: bool

    def quantized(self, directory: Path, samples: list[list[int]], **changes: Any) -> QuantizedLayers:
        how = rule(threshold=self.threshold, **changes)
        return quantized(directory, samples, ALL_4, how, correct_inputs=self.correct_inputs)


@pytest.fixture(scope="module", params=[How("mean", False), How("search", True)], ids=lambda how: how.threshold)
def how(request: pytest.FixtureRequest) -> How:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found(directory: Path, samples: list[list[int]], how: How) -> QuantizedLayers:
    return how.quantized(directory, samples)


@pytest.fixture(scope="module")
def many() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, 271) for _ in range(60)] for _ in range(30)]


@pytest.fixture(scope="module")
def unseen() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, 271) for _ in range(60)] for _ in range(8)]


def test_4_bit_inputs_break_a_model_with_outliers_but_not_a_flattened_one(
    directory: Path, samples: list[list[int]], found: QuantizedLayers, tmp_path: Path
) -> None:
    plain = quantized(directory, samples, ALL_4, rule(max_expansion=1.0))
    for name, inputs in plain.inputs.items():
        assert inputs.flatten is not None and len(inputs.flatten) <= {"down_proj": 160}.get(name.split(".")[-1], 96)
    assert divergence(directory, found, samples, tmp_path / "ours") < 0.5 * divergence(
        directory, plain, samples, tmp_path / "plain"
    )


@pytest.mark.parametrize("change", ["threshold", "correct_inputs"])
def test_what_the_paper_has_not_lowers_errors_on_unseen_text(
    directory: Path, many: list[list[int]], unseen: list[list[int]], change: str
) -> None:
    papers = quantized(directory, many, ALL_4)
    if change == "threshold":
        ours = quantized(directory, many, ALL_4, rule(threshold="search"))
    else:
        ours = quantized(directory, many, ALL_4, correct_inputs=True)
        told = {choice["correction_dampening"] for choice in ours.notes["choice"].values()}
        assert told - {None} and told <= {None, 0.01, 0.1, 1.0}
    target = load_float32(directory)
    errors = [
        sum(layer.error**2 for layer in measure_layers(target, each.layers, each.inputs, unseen).values())
        for each in (ours, papers)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_without_gptq_every_column_is_the_nearest_code_of_its_original(
    directory: Path, samples: list[list[int]], unseen: list[list[int]]
) -> None:
    nearest = quantized(directory, samples, BitsRule("error", None, 0.5), solver="rtn", correct_inputs=True)
    assert {weight.bits for weight in nearest.layers.values()} == {4, 8}
    target: Any = load_float32(directory)
    for name, weight in nearest.layers.items():
        assert nearest.notes["choice"][name]["correction_dampening"] is None
        original = target.get_submodule(name).weight.detach().numpy()[:, nearest.inputs[name].flatten]
        top = (1 << (weight.bits - 1)) - 1
        inside = np.abs(original) <= top * weight.scale
        assert inside.mean() > 0.9
        assert (np.abs(weight.dequantize() - original) <= 0.5001 * weight.scale)[inside].all(), name
    solved = quantized(directory, samples, BitsRule("error", None, 0.5), correct_inputs=True)
    assert solved.notes["gamma"] == nearest.notes["gamma"]
    by_gptq, by_rounding = (
        sum(layer.error**2 for layer in measure_layers(target, each.layers, each.inputs, unseen).values())
        for each in (solved, nearest)
    )
    assert by_gptq < by_rounding


def test_layers_of_8_bits_are_not_corrected(directory: Path, samples: list[list[int]]) -> None:
    with_it, without = (quantized(directory, samples, ALL_8, correct_inputs=each) for each in (True, False))
    for name, weight in without.layers.items():
        np.testing.assert_array_equal(with_it.layers[name].q, weight.q, err_msg=name)
        assert with_it.notes["choice"][name]["correction_dampening"] is None


def test_one_sample_has_no_other_half_to_correct_by(directory: Path, samples: list[list[int]]) -> None:
    layers = quantized(directory, samples[:1], ALL_4, correct_inputs=True)
    assert {choice["correction_dampening"] for choice in layers.notes["choice"].values()} == {None}


def test_singular_hessians_are_an_error_or_each_counted_once(directory: Path, samples: list[list[int]]) -> None:
    few = [sample[:8] for sample in samples[:2]]
    changes: dict[str, Any] = {"correct_inputs": True, "dampening": 1e-9}
    with pytest.raises(SettingError, match=r"^on_singular=error: model\.layers\.0\S* has a singular Hessian"):
        quantized(directory, few, ALL_4, **changes)
    layers = quantized(directory, few, ALL_4, on_singular="rtn", **changes)
    ((_, names),) = layers.fallbacks.items()
    assert len(names) == len(set(names)) > 0
    assert set(names) <= set(layers.layers)


@pytest.mark.parametrize("threshold", ["mean", "search"])
def test_every_layer_is_made_as_its_choice_says(directory: Path, samples: list[list[int]], threshold: str) -> None:
    layers = quantized(directory, samples, BitsRule("error", 0.2, None), rule(threshold=threshold))
    assert layers.notes["gamma"] == 0.2
    widths = set()
    for name, told in layers.notes["choice"].items():
        assert layers.layers[name].shape[1] == told[f"columns_{told['bits']}"]
        scale = np.float32(told[f"threshold_{told['bits']}"] / (7 if told["bits"] == 4 else 127))
        assert layers.inputs[name].scale == scale
        widths.add(told["threshold_4"] == told["threshold_8"])
    assert (False in widths) == (threshold == "search")


def test_a_pass_in_which_nothing_changes_need_not_be_repeated(
    directory: Path, samples: list[list[int]], tmp_path: Path
) -> None:
    for only_watches in (True, False):
        (tmp_path / str(only_watches)).mkdir()
        watcher = SiteWatcher(rule=rule(), num_samples=len(samples), directory=tmp_path / str(only_watches))
        run_recipe(load_model(directory), watcher, samples, only_watches=only_watches)
    once, twice = ({path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("True", "False"))
    assert len(once) == 8
    assert once == twice


def test_measuring_goes_on_where_it_stopped(
    directory: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the third of eight sites, it measures six more; the files are those of a run in one piece."""
    measured: list[int] = []
    site_options = watcher_module.site_options

    def counted(*arguments: Any) -> Any:
        measured.append(len(measured))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return site_options(*arguments)

    layers_done: list[int] = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    measure_sites(directory, samples, rule(), tmp_path / "whole", alpha=None, on_layers=silent)
    monkeypatch.setattr(watcher_module, "site_options", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_sites(directory, samples, rule(), tmp_path / "parts", alpha=None, on_layers=silent)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    measure_sites(directory, samples, rule(), tmp_path / "parts", alpha=None, on_layers=layers_done.append)
    assert len(measured) == 3 + 6
    assert sum(layers_done) == 14
    whole, parts = ({p.name: p.read_bytes() for p in (tmp_path / each).iterdir()} for each in ("whole", "parts"))
    assert whole == parts


def test_gptq_goes_on_behind_its_last_whole_block(directory: Path, samples: list[list[int]], tmp_path: Path) -> None:
    """Weights, inputs and what the correction was damped with are a whole run's in every bit."""

    def stop_in_the_second_block(just_done: int) -> None:
        if next(iter(tmp_path.glob("*.safetensors")), None):
            raise KeyboardInterrupt

    bits = BitsRule("error", None, 0.6)
    whole = quantized(directory, samples, bits, correct_inputs=True)
    with pytest.raises(KeyboardInterrupt):
        quantized(directory, samples, bits, correct_inputs=True, finished=tmp_path, on_layers=stop_in_the_second_block)
    assert len(list(tmp_path.iterdir())) == 1
    resumed = quantized(directory, samples, bits, correct_inputs=True, finished=tmp_path)
    assert resumed.notes == whole.notes
    assert {choice["correction_dampening"] for choice in whole.notes["choice"].values()} > {None}
    for name, weight in whole.layers.items():
        np.testing.assert_array_equal(resumed.layers[name].q, weight.q, err_msg=name)
        np.testing.assert_array_equal(resumed.layers[name].scale, weight.scale, err_msg=name)


def test_input_errors_are_at_least_halved_where_there_are_outliers(
    directory: Path, samples: list[list[int]], found: QuantizedLayers
) -> None:
    plain = quantized(directory, samples, ALL_4, rule(max_expansion=1.0))
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


@pytest.mark.parametrize("criterion", ["error", "ratio"])
def test_gamma_decides_how_many_layers_have_4_bits(
    directory: Path, samples: list[list[int]], criterion: Criterion
) -> None:
    def value(choice: dict[str, float]) -> float:
        return choice["error_4"] / (choice["error_8"] if criterion == "ratio" else 1)

    eight = quantized(directory, samples, ALL_8)
    values = sorted({value(choice) for choice in eight.notes["choice"].values()})
    gamma = values[len(values) // 2]
    middle = quantized(directory, samples, BitsRule(criterion, gamma, None))
    assert {weight.bits for weight in eight.layers.values()} == {8}
    assert {weight.bits for weight in middle.layers.values()} == {4, 8}
    for name, weight in middle.layers.items():
        choice = middle.notes["choice"][name]
        assert weight.bits == middle.inputs[name].grid.bits == choice["bits"]
        assert (value(choice) < gamma) == (choice["bits"] == 4)


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.6, 1.0])
def test_a_share_is_met_as_nearly_as_sites_allow(directory: Path, samples: list[list[int]], wanted: float) -> None:
    layers = quantized(directory, samples, BitsRule("error", None, wanted)).layers
    int4 = sum(weight.q.size for weight in layers.values() if weight.bits == 4)
    sites = [sum(layers[name].q.size for name in site) for site in input_sites(layers)]
    assert abs(int4 / sum(sites) - wanted) <= max(sites) / sum(sites) / 2
    assert (int4 == 0) == (wanted == 0) and (int4 == sum(sites)) == (wanted == 1)


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
    layers = quantized(directory, samples, BitsRule("error", 0.12, None), rule(group_size=group_size), alpha)
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
    layers = quantized(directory, samples, ALL_8)
    target = load_model(directory).eval()
    smooth_as(target, layers.norms)
    for name, error in measure_layers(target, layers.layers, layers.inputs, samples).items():
        assert error.error < 0.03, name
        assert error.saturation == 0.0, name


def test_two_runs_give_the_same_bits(
    directory: Path, samples: list[list[int]], how: How, found: QuantizedLayers
) -> None:
    again = how.quantized(directory, samples)
    for name, weight in found.layers.items():
        np.testing.assert_array_equal(again.layers[name].q, weight.q, err_msg=name)
        assert again.inputs[name].equals(found.inputs[name])
