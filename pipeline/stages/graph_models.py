"""Stages that a graph may hold for more than one model: a source made plain, its calibration, its quantization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from compress.target.sources import Source
from pipeline.graph import Stage, lazy
from pipeline.stages import calibrate, sites
from pipeline.stages.chat_check import check_conversations
from pipeline.stages.quantize_check import CALIBRATED

TORCH = ("torch", "transformers")
VERSIONS = {
    "target": 2,
    "calibrate": 3,
    "sites": 2,
    "quantize": 1,
    "quality": 1,
    "generate": 1,
    "eagle": 5,
    "intermediate": 3,
    "measure": 1,
    "evaluate": 3,
    "export": 6,
}
"""Raised when a stage's code gives other bytes."""
METHOD_REVISIONS = {"smoothquant": 2, "flattenquant": 4}
"""Added to VERSIONS["quantize"], so that a change to one method leaves the others' models as they are."""


def target_stage(source: Source, instance: str = "target") -> Stage:
    """A source as a plain model directory: the target, or another model under its own instance name."""
    return Stage(
        name="target",
        instance=instance,
        version=VERSIONS["target"],
        config={"kind": source.kind, "revision": source.revision},
        build=partial(lazy("pipeline.stages.target:build"), source),
        packages=("gguf",) if source.kind == "gguf" else ("transformers",),
        fingerprint=lambda: {**source.fingerprint(), **lazy("compress.target.inspect:tokenizer_rules")(source)},
        check=lambda _config: lazy("compress.target.inspect:check_source")(source),
    )


def calibrate_stage(config: dict[str, Any], seed: int, threads: int | None, target: Stage, source: Source) -> Stage:
    """Samples for calibration, and held-out ones. source: of the target. threads: None for all there are."""
    read_shape, has_header = (
        partial(lazy(f"compress.target.inspect:{what}"), source) for what in ("read_shape", "has_user_header")
    )

    def check(_keyed: dict[str, Any]) -> None:
        calibrate.check(config)
        check_conversations(config["chat"], has_header)
        calibrate.check_lengths(config, read_shape)

    return Stage(
        name="calibrate",
        instance="calibrate",
        version=VERSIONS["calibrate"],
        config=calibrate.keyed(config),
        build=partial(lazy("pipeline.stages.calibrate:build"), config["text"], threads),
        inputs={"target": target},
        seed=seed,
        packages=calibrate.packages(config),
        fingerprint=partial(calibrate.fingerprint, config),
        check=check,
    )


def quantize_stage(
    name: str,
    config: dict[str, Any],
    source: Source,
    inputs: dict[str, Stage],
    check: Callable[[dict[str, Any]], None],
) -> Stage:
    """A quantized model. name: the variant's. source: of the model, for a method that takes its grid.

    inputs: `target`, the model; `calibrate`. FlattenQuant has a stage before it, which measures sites.
    """
    is_calibrated = config["method"] in CALIBRATED
    if config["method"] == "flattenquant":
        inputs = {**inputs, "sites": _sites_stage(name, config, inputs, check)}
    return stage_of(
        "quantize",
        name,
        config,
        partial(lazy("pipeline.stages.quantize:build"), source, quantize_key(name)),
        {role: stage for role, stage in inputs.items() if role != "calibrate" or is_calibrated},
        packages=_quantize_packages(config),
        check=check,
        revision=METHOD_REVISIONS.get(config["method"], 0),
        resumable=is_calibrated,
    )


def _sites_stage(
    name: str, config: dict[str, Any], inputs: dict[str, Stage], check: Callable[[dict[str, Any]], None]
) -> Stage:
    """What FlattenQuant can do with every site of the model; arguments as of `quantize_stage`."""
    return Stage(
        name="sites",
        instance=role_of("sites", name),
        version=VERSIONS["sites"],
        config=sites.keyed(config),
        build=lazy("pipeline.stages.sites:build"),
        inputs={role: inputs[role] for role in ("target", "calibrate")},
        packages=_quantize_packages(config),
        check=lambda _keyed: check(config),
        resumable=True,
    )


def quantize_key(name: str) -> str:
    """Where the configuration has the method of the quantized model `name`: "" is the bundle's own."""
    if name == "intermediate":
        return "intermediate.quantize"
    return f"quality.variants.{name}" if name else "quantize"


def _quantize_packages(config: dict[str, Any]) -> tuple[str, ...]:
    """Distributions whose version enters the key: gguf's for grids of its files, llmcompressor's for the rest."""
    is_file_grid = config["method"] in ("keep", "q4_0")
    own = ("gguf",) if is_file_grid else ()
    return own if is_file_grid and not config.get("twin") else (*own, *TORCH, "llmcompressor", "compressed-tensors")


def stage_of(
    kind: str,
    name: str,
    config: dict[str, Any],
    build: str | Callable[..., Any],
    inputs: dict[str, Stage],
    *,
    packages: tuple[str, ...],
    check: Callable[[dict[str, Any]], None] | None = None,
    revision: int = 0,
    resumable: bool = False,
) -> Stage:
    """A stage of which a graph may hold several; `name` is the variant's, "" the bundle's own. revision: added to its
    kind's version."""
    return Stage(
        name=kind,
        instance=role_of(kind, name),
        version=VERSIONS[kind] + revision,
        config=config,
        build=lazy(build) if isinstance(build, str) else build,
        inputs=inputs,
        packages=packages,
        check=check,
        resumable=resumable,
    )


def role_of(kind: str, name: str) -> str:
    """The instance and role of a kind's variant `name`; "" is the bundle's own."""
    return f"{kind}-{name}" if name else kind
