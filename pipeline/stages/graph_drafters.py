"""The drafters' part of the graph:

    quantize → generate → eagle-target
    generate → intermediate → quantize-intermediate → measure-intermediate → eagle-intermediate

eagle=none leaves out the first head, intermediate=none the whole second line, eagle@eagle_intermediate=none its head.
All learn from the same conversations of the quantized target; a second `target` stage, intermediate-source, reads the
model from which the intermediate starts, where that is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.target.sources import Source, find_source
from deploy.formats.architectures import ModelShape
from pipeline.graph import Stage, lazy
from pipeline.stages import eagle, generate, intermediate, quantize_check
from pipeline.stages.chat_check import check_prompts
from pipeline.stages.context_check import check_fits_context
from pipeline.stages.drafter_checks import check_heldout
from pipeline.stages.export_drafter import CONFIGS
from pipeline.stages.graph_models import TORCH, VERSIONS, quantize_stage, target_stage

TRAINED_WITH = (*TORCH, "accelerate", "tokenizers", "python")
SOURCE_KEY = "intermediate.initial.path"


def drafter_stages(plain: dict[str, Any], source: Source, models: dict[str, Stage]) -> dict[str, Stage]:
    """By role, the stages of every drafter and of what they learn from; none where there is no drafter.

    plain: the configuration. source: of the target. models: the stages target, calibrate and quantize.
    """
    has_head, has_intermediate = (plain[key]["method"] != "none" for key in ("eagle", "intermediate"))
    if not has_head and not has_intermediate:
        return {}
    generated = _generate(plain, models["target"], models["quantize"], source)
    known = {**models, "generate": generated}
    found = {"generate": known["generate"]}
    if has_head:
        inputs = {role: known[role] for role in ("target", "quantize", "generate")}
        found["eagle-target"] = _head(plain, "eagle-target", partial(_read_shape, source), inputs)
    return found | (_intermediate(plain, source, known) if has_intermediate else {})


def least_acceptance(plain: dict[str, Any], stages: dict[str, Stage]) -> dict[str, float]:
    """Role of each drafter among `stages` → the least acceptance with which it is exported."""
    return {role: plain[key]["min_acceptance"] for role, key in CONFIGS.items() if role in stages}


def _generate(plain: dict[str, Any], target: Stage, quantized: Stage, source: Source) -> Stage:
    config, read_shape = plain["generate"], partial(_read_shape, source)

    def check(_config: dict[str, Any]) -> None:
        generate.check(config)
        check_prompts(config["prompts"]["share"], partial(lazy("compress.target.inspect:has_user_header"), source))
        written = config["self_written"]["max_tokens"] if config["prompts"]["share"] < 1 else 1
        check_fits_context("generate.max_tokens", config["max_tokens"], read_shape, beside=written)

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
        check=check,
        resumable=True,
        continues=generate.continues,
    )


def _head(plain: dict[str, Any], role: str, read_shape: Callable[[], ModelShape], inputs: dict[str, Stage]) -> Stage:
    """An EAGLE head over the model of input `quantize`, whose shape `read_shape` gives."""
    key = CONFIGS[role]
    config = plain[key]

    def check(_keyed: dict[str, Any]) -> None:
        eagle.check(config, read_shape, key)
        check_heldout(plain["generate"])
        eagle.check_place(config, key, Path(plain["bundles"]) / plain["name"])

    return Stage(
        name="eagle",
        instance=role,
        version=VERSIONS["eagle"],
        config=eagle.keyed(config),
        build=partial(lazy("pipeline.stages.eagle:build"), eagle.unkeyed(config), config["initial"], plain["threads"]),
        inputs=inputs,
        seed=plain["seed"],
        packages=TRAINED_WITH,
        fingerprint=partial(eagle.fingerprint, config, key),
        check=check,
        resumable=True,
    )


def _intermediate(plain: dict[str, Any], target_source: Source, known: dict[str, Stage]) -> dict[str, Stage]:
    """The intermediate model, quantized and measured, and its head; known: target, calibrate, quantize, generate."""
    config = plain["intermediate"]
    source, inputs = _start(config["initial"], target_source, known)
    if intermediate.needs_teacher(config):
        inputs["quantize"] = known["quantize"]
    trained = Stage(
        name="intermediate",
        instance="intermediate",
        version=VERSIONS["intermediate"],
        config=intermediate.keyed(config, plain["calibrate"]["text"]["heldout_share"]),
        build=partial(lazy("pipeline.stages.intermediate:build"), intermediate.unkeyed(config), plain["threads"]),
        inputs=inputs,
        seed=plain["seed"],
        packages=(*TRAINED_WITH, "peft", *intermediate.text_packages(config)),
        fingerprint=partial(intermediate.fingerprint, config),
        check=lambda _keyed: _check_intermediate(plain, source, target_source),
        resumable=True,
    )
    quantized = quantize_stage(
        "intermediate",
        config["quantize"],
        source,
        {"target": trained, "calibrate": known["calibrate"]},
        lambda _config: _check_quantize(plain, source, target_source),
    )
    measured = Stage(
        name="measure",
        instance="measure-intermediate",
        version=VERSIONS["measure"],
        config=intermediate.keyed_measure(config),
        build=partial(lazy("pipeline.stages.intermediate:build_measure"), plain["threads"]),
        inputs={
            **{role: known[role] for role in ("target", "quantize", "generate")},
            "intermediate": trained,
            "quantize-intermediate": quantized,
        },
        packages=TORCH,
    )
    found = {"intermediate-source": inputs["source"]} if "source" in inputs else {}
    found |= {"intermediate": trained, "quantize-intermediate": quantized, "measure-intermediate": measured}
    if plain["eagle_intermediate"]["method"] != "none":
        above = {"target": known["target"], "quantize": quantized, "generate": known["generate"], "measure": measured}
        shape = partial(_planned_shape, config, source, target_source)
        found["eagle-intermediate"] = _head(plain, "eagle-intermediate", shape, above)
    return found


def _start(initial: dict[str, Any], target_source: Source, known: dict[str, Stage]) -> tuple[Source, dict[str, Stage]]:
    """Where the model's layers come from, and the inputs of the stage that trains it."""
    inputs = {role: known[role] for role in ("target", "generate")}
    if not initial.get("path"):
        return target_source, inputs
    path, kind = initial["path"], "gguf" if Path(initial["path"]).is_file() else "hf"
    with _called(SOURCE_KEY):
        source = find_source(kind, path, None, initial["revision"])

    def check(_config: dict[str, Any]) -> None:
        with _called(SOURCE_KEY):
            lazy("compress.target.inspect:check_source")(source)

    stage = target_stage(source, "intermediate-source")
    return source, {**inputs, "source": replace(stage, check=check)}


@contextmanager
def _called(key: str) -> Iterator[None]:
    """Errors about a source name `key` in place of the target's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("target.path", key).replace("target=hf", f"{key}=DIRECTORY")) from error


def _check_intermediate(plain: dict[str, Any], source: Source, target_source: Source) -> None:
    shapes = _shapes(source, target_source)
    intermediate.check(plain["intermediate"], *shapes)
    check_heldout(plain["generate"])
    if source is not target_source:
        read = lazy("compress.target.inspect:read_vocabulary")
        with _called(SOURCE_KEY):
            intermediate.check_vocabularies(partial(read, target_source), partial(read, source))


def _check_quantize(plain: dict[str, Any], source: Source, target_source: Source) -> None:
    """Raises ValueError on a grid that the model cannot have."""
    config, key = plain["intermediate"], "intermediate.quantize"
    method = config["quantize"]
    is_as_it_is = config["initial"]["kind"] == "checkpoint" and not config["phases"]
    if method["method"] == "keep" and not (is_as_it_is and source.kind == "gguf"):
        raise ValueError(
            f"{key}.method=keep takes a GGUF file's own grid, so the model must be such a file, untrained"
            f" (intermediate=checkpoint intermediate.phases=[]); use quantize@{key}=gptq"
        )
    quantize_check.check(method, partial(_planned_shape, config, source, target_source), key)
    quantize_check.check_calibration(method, plain["calibrate"], key)


def _planned_shape(config: dict[str, Any], source: Source, target_source: Source) -> ModelShape:
    target, layers_of = _shapes(source, target_source)
    return intermediate.planned_shape(config, target, layers_of)


def _shapes(source: Source, target_source: Source) -> tuple[ModelShape, ModelShape]:
    """Of the target, and of the model that layers are taken from."""
    with _called(SOURCE_KEY):
        layers_of = _read_shape(source)
    return _read_shape(target_source), layers_of


def _read_shape(source: Source) -> ModelShape:
    shape: ModelShape = lazy("compress.target.inspect:read_shape")(source)
    return shape
