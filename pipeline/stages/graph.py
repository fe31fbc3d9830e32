"""The graph: target → calibrate → quantize → quality → export, with one quantize and one quality per variant; beside
them quantize → generate → eagle-target → export, unless `eagle=none`, and what evaluates all models of the bundle just
before export, unless `evaluate=none`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from compress.target.sources import Source, find_source
from pipeline.graph import Stage, lazy
from pipeline.schema import Config
from pipeline.stages import calibrate, eagle, evaluate, export, generate, quantize

TORCH = ("torch", "transformers")
VERSIONS = {
    "target": 1,
    "calibrate": 1,
    "quantize": 1,
    "quality": 1,
    "generate": 1,
    "eagle": 1,
    "evaluate": 1,
    "export": 4,
}
"""Raised when a stage's code gives other bytes."""


def build_graph(config: Config) -> list[Stage]:
    """The stages that the configuration asks for, in order.

    Raises ValueError when the target cannot be found; everything else is checked by the stages' own checks.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, config), resolve=True, enum_to_str=True))
    source = find_source(*(plain["target"][key] for key in ("kind", "path", "package", "revision")))
    target = _target(plain["target"], source)
    samples = _calibrate(plain["calibrate"], plain["seed"], target)
    methods = {"": plain["quantize"], **_variants(plain, source)}
    qualities = {}
    for name, method in methods.items():
        model = _quantize(name, method, plain["calibrate"], source, target, samples)
        inputs = {"target": target, "calibrate": samples, "quantize": model}
        qualities[name] = _stage("quality", name, {}, "pipeline.stages.quality:build", inputs, packages=TORCH)
    quantized = qualities[""].inputs["quantize"]
    drafter = _drafter(plain, source, target, quantized)
    models = {"target": target, "calibrate": samples, "quantize": quantized, **drafter}
    return [_export(plain, target, qualities, drafter | _evaluate(plain, models))]


def _target(config: dict[str, Any], source: Source) -> Stage:
    return Stage(
        name="target",
        instance="target",
        version=VERSIONS["target"],
        config={"kind": source.kind, "revision": source.revision, "licence": config["licence"]},
        build=partial(lazy("pipeline.stages.target:build"), source),
        packages=("gguf",) if source.kind == "gguf" else ("transformers",),
        fingerprint=source.fingerprint,
        check=lambda _config: lazy("compress.target.inspect:check_source")(source),
    )


def _calibrate(config: dict[str, Any], seed: int, target: Stage) -> Stage:
    unkeyed = {"path"}
    text = {key: value for key, value in config["text"].items() if key not in unkeyed}
    path = config["text"]["path"]
    return Stage(
        name="calibrate",
        instance="calibrate",
        version=VERSIONS["calibrate"],
        config={**config, "text": text},
        build=partial(lazy("pipeline.stages.calibrate:build"), path),
        inputs={"target": target},
        seed=seed,
        packages=(*TORCH, "python"),
        fingerprint=partial(calibrate.fingerprint, config),
        check=partial(calibrate.check, path),
    )


def _quantize(
    name: str, config: dict[str, Any], calibrate_config: dict[str, Any], source: Source, target: Stage, samples: Stage
) -> Stage:
    is_calibrated = config["method"] == "gptq"

    def check(checked: dict[str, Any]) -> None:
        if checked["method"] == "keep" and source.kind != "gguf":
            raise ValueError(
                f"quantize=keep takes a GGUF file's own grid, and target.path={source.origin} is none;"
                " use quantize=gptq"
            )
        quantize.check(checked, lambda: lazy("compress.target.inspect:read_shape")(source))
        quantize.check_calibration(checked, calibrate_config)

    return _stage(
        "quantize",
        name,
        config,
        partial(lazy("pipeline.stages.quantize:build"), source),
        {"target": target, "calibrate": samples} if is_calibrated else {"target": target},
        packages=(*TORCH, "llmcompressor", "compressed-tensors") if config["method"] in ("gptq", "rtn") else ("gguf",),
        check=check,
    )


def _generate(plain: dict[str, Any], target: Stage, quantized: Stage) -> Stage:
    config = plain["generate"]
    writer = quantized if config["writer"] == "quantized" else target
    return Stage(
        name="generate",
        instance="generate",
        version=VERSIONS["generate"],
        config=generate.keyed(config),
        build=partial(lazy("pipeline.stages.generate:build"), config, plain["threads"]),
        inputs={"target": target, "model": writer},
        seed=plain["seed"],
        packages=generate.packages(config),
        fingerprint=partial(generate.fingerprint, config),
        check=lambda _config: generate.check(config),
        resumable=True,
    )


def _drafter(plain: dict[str, Any], source: Source, target: Stage, quantized: Stage) -> dict[str, Stage]:
    """By role, the stages that end in a head for the target; none for `eagle=none`."""
    config = plain["eagle"]
    if config["method"] == "none":
        return {}
    generated = _generate(plain, target, quantized)

    def check(_keyed: dict[str, Any]) -> None:
        eagle.check(config, lambda: lazy("compress.target.inspect:read_shape")(source))
        eagle.check_heldout(plain["generate"])

    head = Stage(
        name="eagle",
        instance="eagle-target",
        version=VERSIONS["eagle"],
        config=eagle.keyed(config),
        build=partial(lazy("pipeline.stages.eagle:build"), eagle.unkeyed(config), plain["threads"]),
        inputs={"target": target, "quantize": quantized, "generate": generated},
        seed=plain["seed"],
        packages=(*TORCH, "accelerate", "tokenizers", "python"),
        check=check,
        resumable=True,
    )
    return {"generate": generated, "eagle-target": head}


def _evaluate(plain: dict[str, Any], models: dict[str, Stage]) -> dict[str, Stage]:
    """By role, the stage that measures the bundle's modes; none for `evaluate=none`."""
    config, calibrated = plain["evaluate"], plain["calibrate"]
    if config["method"] == "none":
        return {}
    num_heldout = calibrated["chat"]["num_heldout"] + calibrated["text"]["num_heldout"]
    stage = Stage(
        name="evaluate",
        instance="evaluate",
        version=VERSIONS["evaluate"],
        config=config,
        build=partial(lazy("pipeline.stages.evaluate:build"), plain["threads"]),
        inputs=models,
        seed=plain["seed"],
        packages=("tokenizers",),
        check=partial(evaluate.check, has_generated="generate" in models, num_heldout=num_heldout),
    )
    return {"evaluate": stage}


def _export(plain: dict[str, Any], target: Stage, qualities: dict[str, Stage], more: dict[str, Stage]) -> Stage:
    """more: the stages of drafters and of the evaluation, by role."""
    quantized = {name: quality.inputs["quantize"] for name, quality in qualities.items()}
    inputs = {"target": target, "calibrate": next(iter(qualities.values())).inputs["calibrate"]}
    inputs |= {_role("quantize", name): stage for name, stage in quantized.items()}
    inputs |= {_role("quality", name): stage for name, stage in qualities.items()}
    inputs |= more
    bundles, name = Path(plain["bundles"]), plain["name"]
    config = {
        "name": name,
        "methods": {_role("quantize", name): s.config for name, s in quantized.items()},
        "min_acceptance": plain["eagle"]["min_acceptance"] if "eagle-target" in more else None,
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


def _stage(
    kind: str,
    name: str,
    config: dict[str, Any],
    build: str | Callable[..., Any],
    inputs: dict[str, Stage],
    *,
    packages: tuple[str, ...],
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Stage:
    """A stage of which a graph may hold several; `name` is the variant's, "" the bundle's own."""
    return Stage(
        name=kind,
        instance=_role(kind, name),
        version=VERSIONS[kind],
        config=config,
        build=lazy(build) if isinstance(build, str) else build,
        inputs=inputs,
        packages=packages,
        check=check,
    )


def _role(kind: str, name: str) -> str:
    return f"{kind}-{name}" if name else kind


def _variants(plain: dict[str, Any], source: Source) -> dict[str, dict[str, Any]]:
    """The methods to compare with, without what is the bundle's own method and what the source has no grid for."""
    return {
        name: method
        for name, method in plain["quality"]["variants"].items()
        if method != plain["quantize"] and (method["method"] != "keep" or source.kind == "gguf")
    }
