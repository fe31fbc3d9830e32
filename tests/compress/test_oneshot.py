"""GPTQ and rounding by llmcompressor, against a textbook implementation and a grid written out here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmcompressor.modifiers.gptq import base as gptq_base

from compress import oneshot, recipes
from compress.counting_gptq import CountingGPTQ
from compress.errors import SettingError
from compress.grids import QuantizedLayers, WeightGrid
from compress.load import load_float32, replace_weights
from compress.write import write_quantized
from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16

DAMPENING = 0.01
GRIDS = [WeightGrid(4, 32, symmetric=False), WeightGrid(4, 32, symmetric=True), WeightGrid(8, 32, symmetric=False)]
ASYMMETRIC = GRIDS[0]


def gptq(directory: Path, samples: list[list[int]], grid: WeightGrid = ASYMMETRIC, **changes: Any) -> QuantizedLayers:
    arguments: dict[str, Any] = {
        "observer": "memoryless_minmax",
        "dampening": DAMPENING,
        "activation_order": True,
        "on_singular": "error",
        "on_layers": lambda num_layers: None,
    }
    return oneshot.gptq(directory, samples, grid, **(arguments | changes))


def rtn(directory: Path, grid: WeightGrid = ASYMMETRIC) -> QuantizedLayers:
    return oneshot.rtn(directory, grid, observer="memoryless_minmax")


def textbook_gptq(W: np.ndarray, H: np.ndarray, grid: GroupedInt, *, is_ordered: bool) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 without blocks, in float64, on a given grid; returns the quantized W.

    is_ordered: columns by falling diagonal of H, each on the grid of its own place ("static" activation order).
    """
    W, H = W.astype(np.float64), H.astype(np.float64)
    num_columns = len(H)
    order = np.argsort(-np.diag(H), kind="stable") if is_ordered else np.arange(num_columns)
    H = H + DAMPENING * np.diag(H).mean() * np.eye(num_columns)
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    W, Q = W[:, order], np.zeros_like(W)
    zero_points: Any = grid.zero_point
    for i, column in enumerate(order):
        scale = grid.scale[:, column // grid.group_size].astype(np.float64)
        zero = zero_points[:, column // grid.group_size].astype(np.float64)
        code = np.clip(np.rint(W[:, i] / scale + zero), 0, (1 << grid.bits) - 1)
        Q[:, column] = scale * (code - zero)
        error = (W[:, i] - Q[:, column]) / U[i, i]
        W[:, i:] -= np.outer(error, U[i, i:])
    return Q


def loss(original: np.ndarray, quantized: np.ndarray, H: np.ndarray) -> float:
    """tr(Δ H Δᵀ): the squared error of the layer's outputs."""
    delta = (original - quantized).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", delta, H, delta, optimize=True))


def hessians(model: Any, samples: list[list[int]], names: list[str]) -> dict[str, np.ndarray]:
    """Sums of x xᵀ over the inputs of the named layers, in float64."""
    sums: dict[str, np.ndarray] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
            x = inputs[0].flatten(0, -2).double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [model.get_submodule(name).register_forward_hook(collect(name)) for name in names]
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample]))
    for handle in handles:
        handle.remove()
    return sums


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that bfloat16 holds exactly, so that writing it changes nothing but the quantized layers."""
    path = tmp_path_factory.mktemp("target")
    tiny.causal_lm().bfloat16().float().save_pretrained(path)
    tiny.tokenizer(path)
    return path


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 271) for _ in range(length)] for length in (61, 40, 57, 33, 64, 52)]


@pytest.fixture(scope="module")
def found(directory: Path, samples: list[list[int]]) -> QuantizedLayers:
    return gptq(directory, samples)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("is_ordered", [True, False])
def test_gptq_is_the_textbooks_within_two_percent(
    directory: Path, samples: list[list[int]], grid: WeightGrid, is_ordered: bool
) -> None:
    found = gptq(directory, samples, grid, activation_order=is_ordered)
    assert found.fallbacks == {}
    assert len(found.layers) == 14
    model: Any = load_float32(directory)
    originals = {name: model.get_submodule(name).weight.detach().numpy().copy() for name in found.layers}
    for layer in (0, 1):
        names = [name for name in found.layers if f"layers.{layer}." in name]
        for name, H in hessians(model, samples, names).items():
            expected = textbook_gptq(originals[name], H, found.layers[name], is_ordered=is_ordered)
            ours = loss(originals[name], found.layers[name].dequantize(), H)
            assert ours == pytest.approx(loss(originals[name], expected, H), rel=0.02), name
        # The next layer's inputs come out of this one quantized.
        replace_weights(model, {name: found.layers[name] for name in names})


def test_gptq_loses_less_than_rounding_on_its_inputs(
    directory: Path, samples: list[list[int]], found: QuantizedLayers
) -> None:
    rounded = rtn(directory)
    model: Any = load_float32(directory)
    names = [name for name in found.layers if "layers.0." in name]
    for name, H in hessians(model, samples, names).items():
        weight = model.get_submodule(name).weight.detach().numpy()
        better, worse = (loss(weight, each.layers[name].dequantize(), H) for each in (found, rounded))
        assert better < 0.9 * worse, name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_takes_the_nearest_code_of_the_groups_range(directory: Path, grid: WeightGrid) -> None:
    model: Any = load_float32(directory)
    top = (1 << grid.bits) - 1
    weight: Any
    for name, weight in rtn(directory, grid).layers.items():
        values = model.get_submodule(name).weight.detach().numpy().astype(np.float64)
        grouped = values.reshape(len(values), -1, 32)
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        span = 2 * np.maximum(-low, high) if grid.symmetric else high - low
        np.testing.assert_allclose(weight.scale, span / top, rtol=2**-8, err_msg=name)
        scale, zero = weight.scale[..., None].astype(np.float64), weight.zero_point[..., None].astype(np.float64)
        nearest = scale * (np.clip(np.rint(grouped / scale + zero), 0, top) - zero)
        steps = np.abs(weight.dequantize().reshape(grouped.shape) - nearest) / scale
        # Float32 may round a value that lies halfway the other way.
        assert np.mean(steps > 1e-3) < 0.002, name
        assert steps.max() <= 1 + 1e-3


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_exact_in_bfloat16(directory: Path, samples: list[list[int]], method: str, grid: WeightGrid) -> None:
    result = gptq(directory, samples, grid) if method == "gptq" else rtn(directory, grid)
    for weight in result.layers.values():
        np.testing.assert_array_equal(from_bfloat16(to_bfloat16(weight.scale)), weight.scale)
        assert (weight.bits, weight.group_size) == (grid.bits, 32)
        if grid.symmetric:
            assert np.all(weight.zero_point == 1 << (grid.bits - 1))


def test_two_runs_give_the_same_bits(directory: Path, samples: list[list[int]], found: QuantizedLayers) -> None:
    random.seed(5)
    torch.manual_seed(5)  # whatever state others left behind
    again = gptq(directory, samples)
    assert again.layers.keys() == found.layers.keys()
    for name, weight in found.layers.items():
        for part in ("q", "scale", "minimum", "zero_point"):
            np.testing.assert_array_equal(getattr(again.layers[name], part), getattr(weight, part), err_msg=name)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_written_artifact_gives_the_logits_of_the_model_in_memory(
    directory: Path,
    samples: list[list[int]],
    tmp_path: Path,
    ids: Callable[..., torch.Tensor],
    method: str,
    grid: WeightGrid,
) -> None:
    scheme: Any = {
        "config_groups": {"group_0": recipes.weight_scheme(grid, "memoryless_minmax")},
        "ignore": recipes.IGNORED,
    }
    model: Any = recipes.load_model(directory)
    if method == "gptq":
        recipes.run_recipe(model, CountingGPTQ(**scheme), samples)
    else:
        recipes.run_recipe(model, oneshot.QuantizationModifier(**scheme))
    layers = recipes.read_grids(model)
    for name, weight in layers.items():
        if method == "gptq":
            np.testing.assert_array_equal(weight.dequantize(), model.get_submodule(name).weight.detach().numpy())
    write_quantized(directory, layers, tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(load_float32(tmp_path / "out")(ids(2, 19)).logits, model(ids(2, 19)).logits)


def test_progress_counts_every_layer_once(directory: Path, samples: list[list[int]]) -> None:
    seen: list[int] = []
    gptq(directory, samples[:1], on_layers=seen.append)
    assert sum(seen) == 14


# One sample of 8 tokens leaves rank 8 of 96. At 1e-9 of the diagonal float32 finds no factor of H; at 1e-6 it finds
# one, but none of the inverse.
@pytest.mark.parametrize("dampening", [1e-9, 1e-6])
def test_a_singular_hessian_is_an_error_or_a_counted_rounding(
    directory: Path, samples: list[list[int]], dampening: float
) -> None:
    few = [samples[0][:8]]
    with pytest.raises(
        SettingError, match=r"^on_singular=error: model\.layers\.0\S* has a singular Hessian; .* raise dampening"
    ):
        gptq(directory, few, dampening=dampening)
    found, rounded = gptq(directory, few, dampening=dampening, on_singular="rtn"), rtn(directory)
    ((policy, names),) = found.fallbacks.items()
    assert policy == "singular Hessian, rounded to nearest"
    assert names
    assert len(names) == len(set(names))
    for name in names:
        np.testing.assert_array_equal(found.layers[name].q, rounded.layers[name].q, err_msg=name)


def test_a_singular_hessian_leaves_a_range_by_inputs_as_it_was_found(directory: Path, samples: list[list[int]]) -> None:
    """At 1e-6 the library takes the observer's statistics before it finds no factor of the inverse."""
    found = gptq(directory, [samples[0][:8]], dampening=1e-6, on_singular="rtn", observer="imatrix_mse")
    ((_policy, names),) = found.fallbacks.items()
    model: Any = load_float32(directory)
    assert names
    for name in names:
        weight: Any = found.layers[name]
        values = model.get_submodule(name).weight.detach().numpy().astype(np.float64)
        scale, zero = weight.scale[..., None].astype(np.float64), weight.zero_point[..., None].astype(np.float64)
        nearest = scale * (np.clip(np.rint(values.reshape(len(values), -1, 32) / scale + zero), 0, 15) - zero)
        steps = np.abs(weight.dequantize().reshape(nearest.shape) - nearest) / scale
        assert np.mean(steps > 1e-3) < 0.002, name


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_an_accelerator_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, directory: Path, samples: list[list[int]], found: QuantizedLayers, method: str
) -> None:
    """Under the "meta" device, which holds no values, nothing could be computed or read."""
    expected = found if method == "gptq" else rtn(directory)
    for pipeline in (recipes.data_free, recipes.sequential):
        monkeypatch.setattr(pipeline, "get_main_device", lambda: torch.device("meta"))
    again = gptq(directory, samples) if method == "gptq" else rtn(directory)
    for name, weight in expected.layers.items():
        np.testing.assert_array_equal(again.layers[name].q, weight.q, err_msg=name)


def test_a_feature_that_is_always_zero_is_no_obstacle(tiny: Any, tmp_path: Path, samples: list[list[int]]) -> None:
    model = tiny.causal_lm()
    model.model.layers[0].input_layernorm.weight.data[[3, 50]] = 0
    model.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path)
    found = gptq(tmp_path, samples)
    assert found.fallbacks == {}
    weight = found.layers["model.layers.0.self_attn.q_proj"].dequantize()
    assert np.isfinite(weight).all()
    assert np.abs(weight[:, [3, 50]]).max() <= 1e-6 + np.abs(weight).max() / 100


def test_a_failed_run_leaves_nothing_behind_for_the_next(
    directory: Path, samples: list[list[int]], found: QuantizedLayers
) -> None:
    with pytest.raises(RuntimeError, match="index out of range"):
        gptq(directory, [[3, 10_000_000]])
    again = gptq(directory, samples)
    assert again.fallbacks == {}
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(again.layers[name].q, found.layers[name].q)


@pytest.mark.slow
def test_on_a_real_layer_gptq_is_the_textbooks_and_beats_rounding(tiny: Any, tmp_path: Path) -> None:
    """The first layer of the embedded model, on its inputs from Python's own prose."""
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    from compress.calibration.texts import python_documents, split_documents, windows
    from compress.target.gguf_convert import convert
    from compress.target.gguf_source import GgufFile

    convert(GgufFile(tiny.embedded_file()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers." not in name or "layers.0." in name}
    save_file(kept, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    documents, _ = split_documents(python_documents()["prose"], heldout_share=0.2, seed=0)
    rng = np.random.default_rng(0)
    taken = windows(
        documents,
        lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        group="prose",
        split="calibration",
        num_samples=12,
        sequence_length=256,
        rng=rng,
    )
    samples = [list(sample.ids) for sample in taken]
    found, rounded = gptq(tmp_path, samples), rtn(tmp_path)
    model: Any = load_float32(tmp_path)
    for name, H in hessians(model, samples, list(found.layers)).items():
        weight = model.get_submodule(name).weight.detach().numpy()
        expected = loss(weight, textbook_gptq(weight, H, found.layers[name], is_ordered=True), H)
        ours = loss(weight, found.layers[name].dequantize(), H)
        assert ours == pytest.approx(expected, rel=0.02), name
        assert ours < loss(weight, rounded.layers[name].dequantize(), H), name


def stop_at(num_layers: int) -> Callable[[int], None]:
    """Progress that stops the pass with so many layers done."""
    seen: list[int] = []

    def on_layers(just_done: int) -> None:
        seen.append(just_done)
        if sum(seen) >= num_layers:
            raise KeyboardInterrupt

    return on_layers


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_layers", [9, 14])
def test_a_pass_that_was_stopped_goes_on_behind_its_last_whole_block(
    directory: Path, samples: list[list[int]], tmp_path: Path, grid: WeightGrid, num_layers: int
) -> None:
    """Of two blocks of seven layers, one is done: its layers come from the file, and all bits are a whole pass's."""
    with pytest.raises(KeyboardInterrupt):
        gptq(directory, samples, grid, finished=tmp_path, on_layers=stop_at(num_layers))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.MonkeyPatch.context() as patched:
        calibrated: set[Any] = set()
        accumulate = gptq_base.accumulate_hessian

        def counted(x: Any, module: Any, *rest: Any) -> Any:
            calibrated.add(module)
            return accumulate(x, module, *rest)

        patched.setattr(gptq_base, "accumulate_hessian", counted)
        seen: list[int] = []
        resumed = gptq(directory, samples, grid, finished=tmp_path, on_layers=seen.append)
    assert (sum(seen), len(calibrated)) == (14, 7)
    whole = gptq(directory, samples, grid)
    assert resumed.layers.keys() == whole.layers.keys()
    for name, weight in whole.layers.items():
        for part in ("q", "scale", "minimum", "zero_point"):
            np.testing.assert_array_equal(getattr(resumed.layers[name], part), getattr(weight, part), err_msg=name)


def test_layers_that_fell_back_are_remembered(directory: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"dampening": 1e-12, "on_singular": "rtn"}
    samples = [[5, 6, 7]]
    whole = gptq(directory, samples, **few)
    assert whole.fallbacks
    with pytest.raises(KeyboardInterrupt):
        gptq(directory, samples, finished=tmp_path, on_layers=stop_at(9), **few)
    for _ in ("with one block that is done", "with both"):
        assert gptq(directory, samples, finished=tmp_path, **few).fallbacks == whole.fallbacks
