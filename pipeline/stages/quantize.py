"""quantize: `model/`, the target with packed weights (and `twin/`, a standard form of it, on request)."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from compress.errors import SettingError
from compress.grids import QuantizedLayers, WeightGrid
from compress.target.sources import Source
from deploy.formats.packed import GroupedInt
from pipeline.graph import BuildContext
from pipeline.stages.quantize_inputs import (
    OBSERVERS,
    calibration_ids,
    describe_layers,
    flattenquant,
    num_layers,
    smoothquant,
)

TWIN_GRID = WeightGrid(bits=4, group_size=32, symmetric=False)


def build(source: Source, key: str, context: BuildContext) -> None:
    """Writes `model/`, `stats.json` and, where asked for, `twin/`; goes on behind the blocks that GPTQ had finished.

    source: where `keep` finds the file's own grid. key: of the configuration. Raises ValueError naming it when a
    setting does not fit what calibration gives.
    """
    from compress.write import stored_bits_per_weight, write_quantized

    target = context.inputs["target"] / "model"
    try:
        result = _METHODS[context.config["method"]](context, target, source)
    except SettingError as error:
        raise ValueError(f"{key}.{error}") from error
    gc.collect()  # llmcompressor's models refer to themselves, and what is measured next needs their memory
    write_quantized(target, result.layers, context.out / "model", inputs=result.inputs, norms=result.norms)
    stats = {
        "method": context.config["method"],
        "num_layers": len(result.layers),
        "bits_per_weight": stored_bits_per_weight(result.layers, result.inputs),
        "num_bytes": (context.out / "model" / "model.safetensors").stat().st_size,
        "fallbacks": result.fallbacks,
        "float_minima": any(weight.zero_point is None for weight in result.layers.values()),
    }
    figures: dict[str, Any] = {}
    if result.inputs:
        figures, layers = describe_layers(context, target, result)
        stats |= {"inputs": figures, "layers": layers}
    if context.config.get("twin"):
        write_quantized(target, _twin(target), context.out / "twin")
    (context.out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    counted = {policy: len(layers) for policy, layers in result.fallbacks.items()}
    context.summary.update({**stats, "fallbacks": counted})
    context.summary.pop("layers", None)
    numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
    context.tracker.summary(context.stage, {"bits_per_weight": stats["bits_per_weight"], **counted, **numbers})


def _gptq(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    from compress import oneshot

    config, samples = context.config, calibration_ids(context)
    with context.progress(num_layers(target), f"GPTQ on {len(samples)} samples", "layers") as bar:
        return oneshot.gptq(
            target,
            samples,
            _grid(config),
            observer=OBSERVERS[config["observer"]],
            dampening=config["dampening"],
            activation_order=config["activation_order"],
            on_singular=config["on_singular"],
            on_layers=bar.update,
            finished=context.scratch,
        )


def _rtn(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    from compress import oneshot

    return oneshot.rtn(target, _grid(context.config), observer=OBSERVERS[context.config["observer"]])


def _keep(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    from compress.gguf_grids import keep
    from compress.target.inspect import open_gguf
    from deploy.formats.architectures import linear_layers
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(target) as files:
        names = [layer.name for layer in linear_layers(files.shape)]
        return keep(open_gguf(source.path), names, files.shape.num_layers)


def _q4_0(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    from compress.gguf_grids import q4_0
    from deploy.formats.architectures import linear_layers
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(target) as files:
        names = [layer.name for layer in linear_layers(files.shape)]
        with context.progress(len(names), "Q4_0", "layers") as bar:
            layers = {}
            for name in names:
                layers[name] = q4_0(files.float32(f"{name}.weight"))
                bar.update(1)
    return QuantizedLayers(layers)


_METHODS = {
    "gptq": _gptq,
    "rtn": _rtn,
    "keep": _keep,
    "q4_0": _q4_0,
    "smoothquant": smoothquant,
    "flattenquant": flattenquant,
}


def _grid(config: dict[str, Any]) -> WeightGrid:
    return WeightGrid(config["bits"], config["group_size"], config["symmetric"])


def _twin(target: Path) -> dict[str, GroupedInt]:
    """A standard W4A16 form: the same values rounded to the nearest code on a grid with integer zero points."""
    from compress import oneshot

    return oneshot.rtn(target, TWIN_GRID, observer=OBSERVERS["mse"]).layers
