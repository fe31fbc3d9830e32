"""quantize: `model/`, the target with packed weights (and `twin/`, a standard form of it, on request)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.grids import QuantizedLayers, WeightGrid, check_group_size
from compress.target.sources import Source
from deploy.formats.architectures import ModelShape
from deploy.formats.packed import GroupedInt
from pipeline.graph import BuildContext
from pipeline.stages.calibrate import SAMPLES

OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix_mse": "imatrix_mse"}
TWIN_GRID = WeightGrid(bits=4, group_size=32, symmetric=False)


def check(config: dict[str, Any], read_shape: Callable[[], ModelShape], key: str = "quantize") -> None:
    """Raises ValueError on a grid that this model or this runtime cannot have.

    read_shape: () → the model's ModelShape; called only when the method has a group size. key: of the configuration.
    """
    if "bits" in config and config["bits"] not in (4, 8):
        raise ValueError(f"{key}.bits={config['bits']} is not supported; use 4 or 8")
    if config.get("dampening", 1) <= 0:
        raise ValueError(f"{key}.dampening={config['dampening']} must be above 0; 0.01 is usual")
    if config["method"] == "rtn" and config["observer"] == "imatrix_mse":
        raise ValueError(
            f"{key}.observer=imatrix_mse weighs by calibrated inputs, of which rtn has none; use minmax or mse (for"
            " the comparison beside another method: quality.variants.rtn.observer=mse)"
        )
    if config.get("num_samples") is not None and config["num_samples"] < 1:
        raise ValueError(f"{key}.num_samples={config['num_samples']} must be 1 or more; null takes all")
    if config["method"] == "q4_0":
        check_group_size(read_shape(), 32, key)
    if "group_size" in config:
        if config["group_size"] not in (32, 64, 128):
            raise ValueError(f"{key}.group_size={config['group_size']} is not supported; use 32, 64 or 128")
        check_group_size(read_shape(), config["group_size"], key)


def check_calibration(config: dict[str, Any], calibrate: dict[str, Any], key: str = "quantize") -> None:
    """Raises ValueError when the method calibrates on a group of which `calibrate` makes no samples."""
    if config["method"] != "gptq":
        return
    text_groups = ["prose", "code"] if calibrate["text"]["source"] == "python" else ["text"]
    made = [group for group in ("chat", "free") if calibrate[group]["num_samples"]]
    made += text_groups if calibrate["text"]["num_samples"] else []
    missing = [group for group in config["calibration"] or [] if group not in made]
    if missing or not made:
        raise ValueError(
            f"{key}.calibration={config['calibration']}: calibrate makes no {', '.join(missing) or 'samples'}"
            f" (it makes: {', '.join(made) or 'none'}); choose among these or raise calibrate's budgets"
        )
    num_made = sum(calibrate[g if g in calibrate else "text"]["num_samples"] for g in config["calibration"] or made)
    if (config["num_samples"] or 0) > num_made:
        raise ValueError(
            f"{key}.num_samples={config['num_samples']}: calibrate makes only {num_made}; raise its budgets"
        )


def build(source: Source, context: BuildContext) -> None:
    """Writes `model/`, `stats.json` and, where asked for, `twin/`. source: where `keep` finds the file's own grid."""
    from compress.write import stored_bits_per_weight, write_quantized

    target = context.inputs["target"] / "model"
    result = _METHODS[context.config["method"]](context, target, source)
    write_quantized(target, result.layers, context.out / "model")
    stats = {
        "method": context.config["method"],
        "num_layers": len(result.layers),
        "bits_per_weight": stored_bits_per_weight(result.layers),
        "num_bytes": (context.out / "model" / "model.safetensors").stat().st_size,
        "fallbacks": result.fallbacks,
        "float_minima": any(weight.zero_point is None for weight in result.layers.values()),
    }
    if context.config.get("twin"):
        write_quantized(target, _twin(target), context.out / "twin")
    (context.out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    counted = {policy: len(layers) for policy, layers in result.fallbacks.items()}
    context.summary.update({**stats, "fallbacks": counted})
    context.tracker.summary(context.stage, {"bits_per_weight": stats["bits_per_weight"], **counted})


def _gptq(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    from compress import oneshot
    from compress.calibration.samples import read_samples, spread
    from deploy.formats.architectures import linear_layers
    from deploy.formats.model_dir import ModelDirectory

    config = context.config
    samples = read_samples(context.inputs["calibrate"] / SAMPLES, "calibration", config["calibration"])
    samples = spread(samples, config["num_samples"])
    with ModelDirectory.open(target) as files:
        num_layers = len(linear_layers(files.shape))
    with context.progress(num_layers, f"GPTQ on {len(samples)} samples", "layers") as bar:
        return oneshot.gptq(
            target,
            [sample.ids for sample in samples],
            _grid(config),
            observer=OBSERVERS[config["observer"]],
            dampening=config["dampening"],
            activation_order=config["activation_order"],
            on_singular=config["on_singular"],
            on_layers=bar.update,
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


_METHODS = {"gptq": _gptq, "rtn": _rtn, "keep": _keep, "q4_0": _q4_0}


def _grid(config: dict[str, Any]) -> WeightGrid:
    return WeightGrid(config["bits"], config["group_size"], config["symmetric"])


def _twin(target: Path) -> dict[str, GroupedInt]:
    """A standard W4A16 form: the same values rounded to the nearest code on a grid with integer zero points."""
    from compress import oneshot

    return oneshot.rtn(target, TWIN_GRID, observer=OBSERVERS["mse"]).layers
