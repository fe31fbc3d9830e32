"""The graph: target → calibrate → quantize → quality → export, with one quantize and one quality per variant, `sites`
before FlattenQuant's; beside them the drafters (`graph_drafters`), and what evaluates all models of the bundle just
before export, unless `evaluate=none`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from compress.target.sources import Source, find_source
from pipeline.graph import Stage, lazy
from pipeline.schema import Config
from pipeline.stages import evaluate, export, quantize_check
from pipeline.stages.context_check import ReadShape, check_fits_context
from pipeline.stages.graph_drafters import drafter_stages, least_acceptance
from pipeline.stages.graph_models import (
    TORCH,
    VERSIONS,
    calibrate_stage,
    quantize_key,
    quantize_stage,
    role_of,
    stage_of,
    target_stage,
)

MAX_SEED = 2**31 - 1
"""What every generator takes that a stage may seed: numpy's old one, in training, takes 32 bits, and a process adds its
number."""


def build_graph(config: Config) -> list[Stage]:
    """The stages that the configuration asks for, in order.

    Raises ValueError when the seed is out of range or the target cannot be found; everything else is checked by the
    stages' own checks.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, config), resolve=True, enum_to_str=True))
    if not 0 <= plain["seed"] <= MAX_SEED:
        raise ValueError(f"seed={plain['seed']} is out of range; use a number from 0 to {MAX_SEED}")
    source = find_source(*(plain["target"][key] for key in ("kind", "path", "package", "revision")))
    target = target_stage(source)
    read_shape = partial(lazy("compress.target.inspect:read_shape"), source)
    samples = calibrate_stage(plain["calibrate"], plain["seed"], plain["threads"], target, source)
    methods = {"": plain["quantize"], **_variants(plain, source)}
    qualities = {}
    for name, method in methods.items():
        check = partial(_check_quantize, plain["calibrate"], source, quantize_key(name))
        model = quantize_stage(name, method, source, {"target": target, "calibrate": samples}, check)
        inputs = {"target": target, "calibrate": samples, "quantize": model}
        qualities[name] = stage_of("quality", name, {}, "pipeline.stages.quality:build", inputs, packages=TORCH)
    quantized = qualities[""].inputs["quantize"]
    models = {"target": target, "calibrate": samples, "quantize": quantized}
    drafters = drafter_stages(plain, source, models)
    return [_export(plain, target, qualities, drafters | _evaluate(plain, models | drafters, read_shape))]


def _check_quantize(calibrate_config: dict[str, Any], source: Source, key: str, config: dict[str, Any]) -> None:
    if config["method"] == "keep" and source.kind != "gguf":
        raise ValueError(
            f"quantize=keep takes a GGUF file's own grid, and target.path={source.origin} is none; use quantize=gptq"
        )
    quantize_check.check(config, lambda: lazy("compress.target.inspect:read_shape")(source), key)
    quantize_check.check_calibration(config, calibrate_config, key)


def _evaluate(plain: dict[str, Any], models: dict[str, Stage], read_shape: ReadShape) -> dict[str, Stage]:
    """By role, the stage that measures the bundle's modes; none for `evaluate=none`."""
    config, calibrated = plain["evaluate"], plain["calibrate"]
    if config["method"] == "none":
        return {}
    num_heldout = calibrated["chat"]["num_heldout"] + calibrated["text"]["num_heldout"]

    def check(config: dict[str, Any]) -> None:
        evaluate.check(config, has_generated="generate" in models, num_heldout=num_heldout)
        check_fits_context("evaluate.max_tokens", config["max_tokens"], read_shape, beside=1)

    stage = Stage(
        name="evaluate",
        instance="evaluate",
        version=VERSIONS["evaluate"],
        config=config,
        build=partial(lazy("pipeline.stages.evaluate:build"), plain["threads"]),
        inputs=models,
        seed=plain["seed"],
        packages=("tokenizers",),
        check=check,
    )
    return {"evaluate": stage}


def _export(plain: dict[str, Any], target: Stage, qualities: dict[str, Stage], more: dict[str, Stage]) -> Stage:
    """more: the stages of drafters and of the evaluation, by role."""
    quantized = {name: quality.inputs["quantize"] for name, quality in qualities.items()}
    inputs = {"target": target, "calibrate": next(iter(qualities.values())).inputs["calibrate"]}
    inputs |= {role_of("quantize", name): stage for name, stage in quantized.items()}
    inputs |= {role_of("quality", name): stage for name, stage in qualities.items()}
    inputs |= more
    sites = [stage.inputs["sites"] for stage in inputs.values() if stage.name == "quantize" and "sites" in stage.inputs]
    inputs |= {stage.instance: stage for stage in sites}
    bundles, name = Path(plain["bundles"]), plain["name"]
    config = {
        "name": name,
        "methods": {role_of("quantize", name): s.config for name, s in quantized.items()},
        "min_acceptance": least_acceptance(plain, more),
        "licence": plain["target"]["licence"],
    }
    return Stage(
        name="export",
        instance="export",
        version=VERSIONS["export"],
        config=config,
        build=lazy("pipeline.stages.export:build"),
        inputs=inputs,
        packages=("matplotlib",),
        check=lambda _config: export.check(bundles, name),
        publish=partial(export.publish, bundles, name),
    )


def _variants(plain: dict[str, Any], source: Source) -> dict[str, dict[str, Any]]:
    """The methods to compare with, without what is the bundle's own method and what the source has no grid for."""
    return {
        name: method
        for name, method in plain["quality"]["variants"].items()
        if method != plain["quantize"] and (method["method"] != "keep" or source.kind == "gguf")
    }
