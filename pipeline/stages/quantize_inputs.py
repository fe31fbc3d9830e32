"""The methods of quantize that quantize inputs as well, and what is measured of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.grids import QuantizedLayers, WeightGrid
from compress.target.sources import Source
from deploy.formats.activations import LayerInputs
from deploy.formats.packed import GroupedInt
from pipeline.graph import BuildContext
from pipeline.stages.calibrate import SAMPLES

if TYPE_CHECKING:  # torch, which a reused stage does not need
    from compress.flattenquant.splits import FlattenRule

OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix_mse": "imatrix_mse"}
SITE_FILES = "sites"
"""Where the stage `sites` puts a file for each site."""
CHOICE_SAMPLES = 8
"""Calibration samples on which SmoothQuant's strengths are compared."""
MEASURED_SAMPLES = 12
"""Held-out samples, of all kinds in turn, on which layers are compared one by one."""


def calibration_ids(context: BuildContext, at_most: int | None = None) -> list[list[int]]:
    """Token ids of the samples that the configuration asks for; at_most: the first so many, the groups in turn."""
    from compress.calibration.samples import read_samples, spread

    samples = read_samples(context.inputs["calibrate"] / SAMPLES, "calibration", context.config["calibration"])
    samples = spread(samples, context.config["num_samples"])
    if at_most is not None:
        samples = spread(samples, min(at_most, len(samples)))
    return [list(sample.ids) for sample in samples]


def smoothquant(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    """SmoothQuant, its strength chosen on some of the calibration samples."""
    from compress import smoothquant as method
    from deploy.formats.activations import ActivationGrid

    config, samples = context.config, calibration_ids(context)
    weights, activations = config["weights"], config["activations"]
    rule = method.SmoothQuantRule(
        weights=WeightGrid(weights["bits"], weights["group_size"], weights["symmetric"]),
        activations=ActivationGrid(activations["bits"], activations["scope"]),
        observer=OBSERVERS[weights["observer"]],
        **{key: config[key] for key in ("solver", "dampening", "activation_order", "on_singular")},
    )
    with context.progress(num_layers(target), f"SmoothQuant on {len(samples)} samples", "layers") as bar:
        return method.smoothquant(
            target,
            samples,
            rule,
            alphas=config["alpha"],
            choice_samples=calibration_ids(context, CHOICE_SAMPLES),
            on_layers=bar.update,
            finished=context.scratch,
        )


def flattenquant(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    """FlattenQuant by what the stage `sites` measured, and its solver on the flattened weights."""
    from compress.flattenquant.bits import BitsRule
    from compress.flattenquant.method import SolverRule
    from compress.flattenquant.method import flattenquant as method

    config, samples = context.config, calibration_ids(context)
    bits = BitsRule(**{key: config[key] for key in ("criterion", "gamma", "int4_share")})
    solver = SolverRule(
        **{key: config[key] for key in ("solver", "dampening", "activation_order", "on_singular", "correct_inputs")}
    )
    sites = context.inputs["sites"] / SITE_FILES
    with context.progress(num_layers(target), f"FlattenQuant on {len(samples)} samples", "layers") as bar:
        return method(
            target,
            samples,
            flatten_rule(config),
            sites,
            bits,
            solver,
            alpha=config["alpha"],
            on_layers=bar.update,
            finished=context.scratch,
        )


def flatten_rule(config: dict[str, Any]) -> FlattenRule:
    """What of the method's configuration says how sites are split."""
    from compress.flattenquant.splits import FlattenRule

    weights = config["weights"]
    return FlattenRule(
        group_size=weights["group_size"],
        symmetric=weights["symmetric"],
        observer=OBSERVERS[weights["observer"]],
        **{key: config[key] for key in ("beta", "threshold", "max_expansion")},
    )


def describe_layers(
    context: BuildContext, target: Path, result: QuantizedLayers
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Figures of the model, and of every layer: errors and saturation on held-out text, and what the method chose.

    int4_share: of the linear layers' multiplications, copies included, those of 4-bit weights with 4-bit inputs.
    expansion: multiplications over those without flattening.
    """
    from compress.calibration.samples import read_samples, spread
    from compress.layer_errors import measure_layers, smooth_as
    from compress.load import load_float32

    heldout = read_samples(context.inputs["calibrate"] / SAMPLES, "heldout")
    heldout = spread(heldout, min(MEASURED_SAMPLES, len(heldout)))
    model = load_float32(target)
    smooth_as(model, result.norms)
    with context.progress(len(heldout), "errors by layer on held-out text", "samples") as bar:
        sequences = [sample.ids for sample in heldout]
        errors = measure_layers(model, result.layers, result.inputs, sequences, on_sequences=bar.update)
    layers = {}
    for name, error in errors.items():
        weight, inputs = result.layers[name], result.inputs[name]
        form = {"bits": weight.bits, "input_bits": inputs.grid.bits, "columns": weight.shape[1]}
        layers[name] = {**form, **error.as_dict(), **result.notes.get("choice", {}).get(name, {})}
    return {**input_figures(result.layers, result.inputs), **_saturation(layers), **_chosen(result)}, layers


def input_figures(layers: Mapping[str, GroupedInt], inputs_of: Mapping[str, LayerInputs]) -> dict[str, float]:
    """int4_share and expansion, as of `describe_layers`. layers, inputs_of: by module name."""
    num_int4 = num_all = num_before = 0
    for name, inputs in inputs_of.items():
        weight = layers[name]
        num_out, num_columns = weight.shape
        num_all += num_out * num_columns
        num_before += num_out * (inputs.num_channels or num_columns)
        num_int4 += num_out * num_columns * (weight.bits == inputs.grid.bits == 4)
    return {"int4_share": num_int4 / num_all, "expansion": num_all / num_before}


def _saturation(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of static scales: the mean share of values beyond them, and the worst layer's."""
    rates = [layer["saturation"] for layer in layers.values() if layer["saturation"] is not None]
    return {"saturation": sum(rates) / len(rates), "saturation_worst": max(rates)} if rates else {}


def _chosen(result: QuantizedLayers) -> dict[str, Any]:
    return {key: result.notes[key] for key in ("alpha", "alpha_kl", "gamma") if result.notes.get(key) is not None}


def num_layers(target: Path) -> int:
    """Linear layers of a model directory, the head left out."""
    from deploy.formats.architectures import linear_layers
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(target) as files:
        return len(linear_layers(files.shape))
