"""Rounding one weight as a recipe would: against a recipe that does, and against a grid written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier

from compress.grids import WeightGrid
from compress.recipes import IGNORED, load_model, read_grids, rounded, run_recipe, weight_scheme
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16

GRIDS = [
    WeightGrid(bits, group_size, symmetric=symmetric)
    for bits in (4, 8)
    for group_size in (None, 32)
    for symmetric in (True, False)
]


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("observer", ["memoryless_minmax", "memoryless_mse"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_is_rounded_as_a_recipe_rounds_it(directory: Path, grid: WeightGrid, observer: str) -> None:
    model: Any = load_model(directory)
    groups = {"group_0": weight_scheme(grid, observer)}
    run_recipe(model, QuantizationModifier(config_groups=groups, ignore=IGNORED))
    original: Any = load_model(directory)
    for name, written in read_grids(model).items():
        weight = original.get_submodule(name).weight.data
        ours = rounded(weight, torch.zeros(1, weight.shape[1]), grid, observer)
        np.testing.assert_array_equal(ours.numpy(), written.dequantize(), err_msg=name)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_extremes_of_a_group_are_the_ends_of_its_grid(grid: WeightGrid) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    grouped, top = weight.double().numpy().reshape(7, -1, grid.group_size or 96), (1 << grid.bits) - 1
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    span = 2 * np.maximum(-low, high) if grid.symmetric else high - low
    scale = from_bfloat16(to_bfloat16((span / top).astype(np.float32))).astype(np.float64)[..., None]
    ours = rounded(weight, torch.zeros(1, 96), grid, "memoryless_minmax").double().numpy().reshape(grouped.shape)
    steps = ours / scale
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert np.abs(ours - grouped).max() <= 1.01 * scale.max()
    assert np.mean(np.abs(ours - grouped) > 0.51 * scale) < 0.02  # but for what the last code cannot reach


def test_an_observer_that_weighs_by_inputs_is_given_them() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = 3 * weight[:, 0].sign() + weight[:, 0]  # what widens the range
    grid = WeightGrid(4, None, symmetric=True)
    quiet, loud = torch.ones(3, 64), torch.ones(3, 64)
    quiet[:, 0], loud[:, 0] = 1e-3, 1e3
    errors = [(rounded(weight, inputs, grid, "imatrix_mse") - weight).square() for inputs in (quiet, loud)]
    assert float(errors[0][:, 1:].sum()) < float(errors[1][:, 1:].sum())
    assert float(errors[1][:, 0].sum()) < float(errors[0][:, 0].sum())
