"""γ for a share of 4-bit multiplications."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import frontier
from benchmarks.frontier import Cost, gamma_for, int4_share, layer_costs
from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.safetensors_file import write_safetensors
from tests.tiny_llama import TINY_LLAMA

CONFIG = TINY_LLAMA
# Layers of one site have one value; with 4 bits a layer may have other columns than with 8.
COSTS = [Cost(0.1, 10, 20), Cost(0.1, 5, 10), Cost(0.2, 30, 30), Cost(0.3, 25, 25), Cost(0.4, 30, 15)]


def share(gamma: float) -> float:
    """In words: 4-bit multiplications over all, each layer counted with the columns of its own bits."""
    four = [cost.int4 for cost in COSTS if cost.value < gamma]
    eight = [cost.int8 for cost in COSTS if not cost.value < gamma]
    return sum(four) / (sum(four) + sum(eight))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.15, 0.25, 0.35, 0.5])
def test_a_share_counts_every_layer_with_the_columns_of_its_own_bits(gamma: float) -> None:
    assert int4_share(gamma, COSTS) == pytest.approx(share(gamma))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(0.0, 0), (0.07, 0), (0.1, 15 / 85), (0.4829, 45 / 85), (0.7, 70 / 85), (0.95, 1), (1.0, 1)],
)
def test_the_nearest_share_that_keeps_sites_together_is_found(wanted: float, found: float) -> None:
    assert share(gamma_for(wanted, COSTS)) == pytest.approx(found)


def test_gamma_lies_between_two_values_so_that_rounding_decides_nothing() -> None:
    assert gamma_for(0.5, COSTS) == pytest.approx(0.25)


@pytest.mark.parametrize(("criterion", "values"), [("error", [0.2, 0.5]), ("ratio", [10.0, 5.0])])
def test_a_layers_cost_is_columns_times_outputs_with_either_bits(
    tmp_path: Path, criterion: str, values: list[float]
) -> None:
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    write_safetensors(
        tmp_path / "model.safetensors", {name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()}
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    layers = {
        f"model.layers.0.{name}": {"error_4": four, "error_8": eight, "columns_4": 128, "columns_8": 96}
        for name, four, eight in (("self_attn.k_proj", 0.2, 0.02), ("mlp.down_proj", 0.5, 0.1))
    }
    costs = layer_costs(layers, tmp_path, criterion)
    assert [cost.value for cost in costs] == pytest.approx(values)
    assert [(cost.int4, cost.int8) for cost in costs] == [(128 * 32, 96 * 32), (128 * 64, 96 * 64)]


@pytest.mark.parametrize(("shares", "source"), [([0.5], "choices"), ([0.0, 0.5], "measure")])
def test_no_model_is_made_for_the_errors_alone(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], source: str
) -> None:
    asked = []

    def measured(*overrides: str) -> dict[str, Any]:
        asked.append("measure")
        assert overrides[-1] == "quantize.gamma=0.0"
        return {"stats": {"layers": {}}, "target": Path()}

    def chosen(*_overrides: str) -> tuple[dict[str, Any], Path]:
        asked.append("choices")
        return {}, Path()

    monkeypatch.setattr(frontier, "measure", measured)
    monkeypatch.setattr(frontier, "choices", chosen)
    monkeypatch.setattr(frontier, "layer_costs", lambda *_arguments: COSTS)
    assert frontier.gammas_for(shares) == [gamma_for(each, COSTS) for each in shares]
    assert asked == [source]
