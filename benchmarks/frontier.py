"""FlattenQuant's frontier: share of the linear layers' multiplications in 4 bits against perplexity.

    python -m benchmarks.frontier [--shares 0,0.25,0.4829,0.75,1 | --gammas 0.2,0.28] [--no-smoothquant] [--json OUT]
        [OVERRIDE…]
    python -m benchmarks.frontier --model DIRECTORY [--json OUT] [OVERRIDE…]

Overrides are those of `python -m pipeline`, e.g. store=… target=… quantize.weights.group_size=32; finished stages are
reused, so sites are measured once for all shares. 48.29 % is the paper's share (arXiv 2402.17985). SmoothQuant's W8A8
is measured beside. --model measures a model directory that is there, on the same held-out text: one from an artifact,
or from a run that did not come to its end.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from benchmarks.machine import write_json
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from pipeline.cli import config_directory, run_config
from pipeline.progress import show_progress
from pipeline.schema import Config, register
from pipeline.stages.graph import build_graph
from pipeline.stages.quality import measure_quality
from pipeline.stages.quantize_inputs import input_figures

ALONE = ("quality=none", "eagle=none", "intermediate=none", "evaluate=none")
PLACES = ("store=", "bundles=", "threads=", "target.path=")
"""Overrides that say where things lie here; the result leaves them out, and target.name= says whose figures it has."""
OF_BOTH = ("quantize.num_samples=", "quantize.calibration=")
"""Keys that FlattenQuant and SmoothQuant have in the same sense."""
SHARES = (0.0, 0.25, 0.4829, 0.75, 1.0)


def measure(*overrides: str) -> dict[str, Any]:
    """`quantize` and `quality` of one configuration: what their artifacts hold."""
    paths = finished(configuration("stage=quality", *overrides))
    return {
        "stats": json.loads((paths["quantize"] / "stats.json").read_text(encoding="utf-8")),
        "quality": json.loads((paths["quality"] / "quality.json").read_text(encoding="utf-8")),
    }


def measure_directory(model: Path, *overrides: str) -> dict[str, Any]:
    """The same of a model directory, as far as its files tell; the configuration has the target and the texts."""
    paths = finished(configuration("stage=calibrate", *overrides))
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    quality = measure_quality(model, paths["target"] / "model", paths["calibrate"], show_progress)
    return {"stats": {"inputs": read_figures(model), "num_bytes": num_bytes}, "quality": quality}


def read_figures(model: Path) -> dict[str, float]:
    """`inputs` of stats.json, as far as a model directory tells."""
    with ModelDirectory.open(model) as files:
        found = {name: (files.linear(name), files.inputs(name)) for name in files.layers}
    layers = {name: weight for name, (weight, _) in found.items() if isinstance(weight, GroupedInt)}
    inputs = {name: how for name, (_, how) in found.items() if how is not None and name in layers}
    return input_figures(layers, inputs)


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


def point(found: dict[str, Any]) -> dict[str, Any]:
    """What is told of one model."""
    return {
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


def choices_of_bits(shares: list[float], gammas: list[float] | None) -> list[tuple[str, str]]:
    """The overrides of each point: gammas where there are any, and else shares."""
    if gammas is not None:
        return [("quantize.int4_share=null", f"quantize.gamma={gamma!r}") for gamma in gammas]
    return [(f"quantize.int4_share={share!r}", "quantize.gamma=null") for share in shares]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--shares", type=numbers, default=list(SHARES))
    wanted.add_argument("--gammas", type=numbers, help="instead of shares")
    parser.add_argument("--no-smoothquant", action="store_true", help="FlattenQuant alone")
    wanted.add_argument("--model", type=Path, help="measure this model directory alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register()
    told = [override for override in arguments.overrides if not override.startswith(PLACES)]
    result: dict[str, Any] = {"overrides": told}
    if arguments.model is not None:
        found = measure_directory(arguments.model, *arguments.overrides)
        result["model"], result["source"] = point(found), found["quality"]["source"]
        show(str(arguments.model), result["model"], result["source"])
        write_json(arguments.json, result)
        return
    if not arguments.no_smoothquant:
        shared = [o for o in arguments.overrides if not o.startswith("quantize.") or o.startswith(OF_BOTH)]
        found = measure("quantize=smoothquant", *shared)
        result["smoothquant_w8a8"] = point(found)
        show("SmoothQuant W8A8", result["smoothquant_w8a8"], found["quality"]["source"])
    flattened = ("quantize=flattenquant", *arguments.overrides)
    result["flattenquant"] = []
    for chosen in choices_of_bits(arguments.shares, arguments.gammas):
        found = measure(*flattened, *chosen)
        result["source"] = found["quality"]["source"]
        result["flattenquant"].append(point(found))
        show(f"FlattenQuant γ {result['flattenquant'][-1]['gamma']:.4f}", result["flattenquant"][-1], result["source"])
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
