"""FlattenQuant's frontier: share of the linear layers' multiplications in 4 bits against perplexity.

    python -m benchmarks.frontier [--shares 0,0.25,0.4829,0.75,1] [--json OUT] [OVERRIDE…]

Overrides are those of `python -m pipeline`, e.g. store=… target=… quantize.weights.group_size=32; finished stages are
reused. The first point, all in 8 bits, measures every layer's errors; γ for each share follows from them. 48.29 % is
the paper's share (arXiv 2402.17985). SmoothQuant's W8A8 is measured beside.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from benchmarks.machine import write_json
from deploy.formats.model_dir import ModelDirectory
from pipeline.cli import config_directory, run_config
from pipeline.schema import Config, register
from pipeline.stages.graph import build_graph

ALONE = ("stage=quality", "quality=none", "eagle=none", "intermediate=none", "evaluate=none")
PLACES = ("store=", "bundles=", "threads=", "target.path=")
"""Overrides that say where things lie here; the result leaves them out, and target.name= says whose figures it has."""
OF_BOTH = ("quantize.num_samples=", "quantize.calibration=")
"""Keys that FlattenQuant and SmoothQuant have in the same sense."""
SHARES = (0.0, 0.25, 0.4829, 0.75, 1.0)


def measure(*overrides: str) -> dict[str, Any]:
    """`quantize` and `quality` of one configuration: paths of the artifacts and what they hold."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = cast(Config, compose("config", [*ALONE, *overrides]))
        with tempfile.TemporaryDirectory() as run_dir:
            outcomes = run_config(config, Path(run_dir), build_graph)
    gc.collect()  # llmcompressor's models refer to themselves; several of them would not fit
    paths = {outcome.stage.instance: outcome.artifact.path for outcome in outcomes}
    return {
        "model": paths["quantize"] / "model",
        "stats": json.loads((paths["quantize"] / "stats.json").read_text()),
        "quality": json.loads((paths["quality"] / "quality.json").read_text()),
    }


def layer_costs(found: dict[str, Any], criterion: str) -> list[tuple[float, int]]:
    """Each layer's value under the criterion and its multiplications a token, by rising value."""
    with ModelDirectory.open(found["model"]) as files:
        outputs = {name: layer.num_out for name, layer in files.layers.items()}
    costs = []
    for name, layer in found["stats"]["layers"].items():
        value = layer["error_4"] / layer["error_8"] if criterion == "ratio" else layer["error_4"]
        costs.append((value, layer["columns"] * outputs[name]))
    return sorted(costs)


def gamma_for(share: float, costs: list[tuple[float, int]]) -> float:
    """The γ whose share of multiplications in 4 bits is nearest to `share`, between two layers' values.

    costs: as `layer_costs` has them; layers that read one input have one value, so they stay together.
    """
    values = sorted({value for value, _ in costs})
    between = [(a + b) / 2 for a, b in pairwise(values)]
    candidates = [0.0, *between, values[-1] * 1.01]
    total = sum(count for _, count in costs)

    def distance(gamma: float) -> float:
        return abs(sum(count for value, count in costs if value < gamma) / total - share)

    return min(candidates, key=distance)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], default=list(SHARES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register()
    shared = [o for o in arguments.overrides if not o.startswith("quantize.") or o.startswith(OF_BOTH)]
    first = measure("quantize=flattenquant", *arguments.overrides, "quantize.gamma=0")
    criterion = next((o.partition("=")[2] for o in arguments.overrides if o.startswith("quantize.criterion=")), "error")
    costs, source = layer_costs(first, criterion), first["quality"]["source"]
    smooth = point(measure("quantize=smoothquant", *shared), None)
    show("SmoothQuant W8A8", smooth, source)
    told = [override for override in arguments.overrides if not override.startswith(PLACES)]
    result = {"overrides": told, "source": source, "smoothquant_w8a8": smooth, "flattenquant": []}
    for share in arguments.shares:
        gamma = gamma_for(share, costs)
        found = measure("quantize=flattenquant", *arguments.overrides, f"quantize.gamma={gamma!r}") if gamma else first
        result["flattenquant"].append(point(found, gamma))
        show(f"FlattenQuant γ {gamma:.4f}", result["flattenquant"][-1], source)
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
