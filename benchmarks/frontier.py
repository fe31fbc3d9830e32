"""FlattenQuant's frontier: share of the linear layers' multiplications in 4 bits against perplexity.

    python -m benchmarks.frontier [--shares 0,0.25,0.4829,0.75,1 | --gammas 0.2,0.28] [--no-smoothquant] [--json OUT]
        [OVERRIDE…]

Overrides are those of `python -m pipeline`, e.g. store=… target=… quantize.weights.group_size=32; finished stages are
reused. γ for each share follows from every layer's errors, which the point of share 0 measures, all in 8 bits; where it
is not asked for, they are measured and no model is made of them. 48.29 % is the paper's share (arXiv 2402.17985).
SmoothQuant's W8A8 is measured beside.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from benchmarks.machine import write_json
from deploy.formats.model_dir import ModelDirectory
from pipeline.cli import config_directory, run_config
from pipeline.graph import order_stages
from pipeline.schema import Config, register
from pipeline.stages.graph import build_graph
from pipeline.stages.quantize_inputs import flattenquant_choices

ALONE = ("quality=none", "eagle=none", "intermediate=none", "evaluate=none")
PLACES = ("store=", "bundles=", "threads=", "target.path=")
"""Overrides that say where things lie here; the result leaves them out, and target.name= says whose figures it has."""
OF_BOTH = ("quantize.num_samples=", "quantize.calibration=")
"""Keys that FlattenQuant and SmoothQuant have in the same sense."""
SHARES = (0.0, 0.25, 0.4829, 0.75, 1.0)


@dataclass(frozen=True)
class Cost:
    """One layer. value: its errors under the criterion; int4, int8: its multiplications a token with either bits."""

    value: float
    int4: int
    int8: int


def measure(*overrides: str) -> dict[str, Any]:
    """`quantize` and `quality` of one configuration: what the artifacts hold, and the target's model directory."""
    paths = finished(configuration("stage=quality", *overrides))
    return {
        "target": paths["target"] / "model",
        "stats": json.loads((paths["quantize"] / "stats.json").read_text(encoding="utf-8")),
        "quality": json.loads((paths["quality"] / "quality.json").read_text(encoding="utf-8")),
    }


def choices(*overrides: str) -> tuple[dict[str, dict[str, Any]], Path]:
    """Layer name → errors and columns with either bits, as `layers` of stats.json, and the target's model directory.

    No model is quantized for it.
    """
    config = configuration("stage=calibrate", *overrides)
    stages = {stage.instance: stage for stage in order_stages(build_graph(config))}
    stage = stages["quantize"]
    if stage.check is not None:
        stage.check(stage.config)
    paths = finished(config)
    logging.info("errors of every layer with 4 bits and with 8")
    found = flattenquant_choices(stage.config, paths["target"] / "model", paths["calibrate"])
    gc.collect()
    return found, paths["target"] / "model"


def configuration(*overrides: str) -> Config:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return cast(Config, compose("config", [*ALONE, *overrides]))


def finished(config: Config) -> dict[str, Path]:
    """Runs the configuration: instance → its artifact's directory."""
    with tempfile.TemporaryDirectory() as run_dir:
        outcomes = run_config(config, Path(run_dir), build_graph)
    gc.collect()  # llmcompressor's models refer to themselves; several of them would not fit
    return {outcome.stage.instance: outcome.artifact.path for outcome in outcomes}


def layer_costs(layers: dict[str, dict[str, Any]], target: Path, criterion: str) -> list[Cost]:
    """Of every layer. layers: as of `choices`; target: a model directory; criterion: error or ratio."""
    with ModelDirectory.open(target) as files:
        outputs = {name: layer.num_out for name, layer in files.layers.items()}
    return [
        Cost(
            layer["error_4"] / layer["error_8"] if criterion == "ratio" else layer["error_4"],
            layer["columns_4"] * outputs[name],
            layer["columns_8"] * outputs[name],
        )
        for name, layer in layers.items()
    ]


def int4_share(gamma: float, costs: list[Cost]) -> float:
    """Of all multiplications, those of layers whose value is below `gamma`, which have 4 bits."""
    int4 = sum(cost.int4 for cost in costs if cost.value < gamma)
    return int4 / (int4 + sum(cost.int8 for cost in costs if cost.value >= gamma))


def gamma_for(share: float, costs: list[Cost]) -> float:
    """The γ whose share of multiplications in 4 bits is nearest to `share`, between two layers' values.

    Layers that read one input have one value, so they stay together.
    """
    values = sorted({cost.value for cost in costs})
    between = [(a + b) / 2 for a, b in pairwise(values)]
    candidates = [0.0, *between, values[-1] * 1.01]
    return min(candidates, key=lambda gamma: abs(int4_share(gamma, costs) - share))


def gammas_for(shares: list[float], *overrides: str) -> list[float]:
    """γ of each share. Errors come from the model of share 0 where there is to be one, and else without any model."""
    criterion = next((o.partition("=")[2] for o in overrides if o.startswith("quantize.criterion=")), "error")
    if 0 in shares:
        whole = measure(*overrides, "quantize.gamma=0.0")
        layers, target = whole["stats"]["layers"], whole["target"]
    else:
        layers, target = choices(*overrides)
    costs = layer_costs(layers, target, criterion)
    return [gamma_for(share, costs) for share in shares]


def point(found: dict[str, Any], gamma: float | None) -> dict[str, Any]:
    """What is told of one model."""
    return {
        "gamma": gamma,
        **found["stats"]["inputs"],
        "bytes": found["stats"]["num_bytes"],
        "quality": found["quality"]["model"],
    }


def show(label: str, told: dict[str, Any], source: dict[str, Any]) -> None:
    parts = [
        f"{group} {values['perplexity']:.3f} ({values['perplexity'] / source[group]['perplexity']:.3f}×), KL"
        f" {values['kl']:.4f}"
        for group, values in told["quality"].items()
    ]
    print(
        f"{label:22} 4-bit {told['int4_share']:6.2%}  columns {told['expansion']:.3f}×  {'; '.join(parts)}", flush=True
    )


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--shares", type=numbers, default=list(SHARES))
    wanted.add_argument("--gammas", type=numbers, help="instead of shares")
    parser.add_argument("--no-smoothquant", action="store_true", help="FlattenQuant alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register()
    told = [override for override in arguments.overrides if not override.startswith(PLACES)]
    result: dict[str, Any] = {"overrides": told}
    if not arguments.no_smoothquant:
        shared = [o for o in arguments.overrides if not o.startswith("quantize.") or o.startswith(OF_BOTH)]
        found = measure("quantize=smoothquant", *shared)
        result["smoothquant_w8a8"] = point(found, None)
        show("SmoothQuant W8A8", result["smoothquant_w8a8"], found["quality"]["source"])
    flattened = ("quantize=flattenquant", *arguments.overrides)
    result["flattenquant"] = []
    for gamma in arguments.gammas or gammas_for(arguments.shares, *flattened):
        found = measure(*flattened, f"quantize.gamma={gamma!r}")
        result["source"] = found["quality"]["source"]
        result["flattenquant"].append(point(found, gamma))
        show(f"FlattenQuant γ {gamma:.4f}", result["flattenquant"][-1], result["source"])
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
