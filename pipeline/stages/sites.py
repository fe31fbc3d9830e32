"""sites: what FlattenQuant can do with every site of a model, measured once for all shares, thresholds and solvers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.grids import QuantizedLayers
from compress.target.sources import Source
from pipeline.graph import BuildContext
from pipeline.stages.quantize_inputs import OBSERVERS, calibration_ids, finished_blocks, num_layers

if TYPE_CHECKING:  # torch, which a reused stage does not need
    from compress.flattenquant.choice import FlattenRule

FILES = "sites"
KEYS = ("alpha", "beta", "threshold", "max_expansion", "weights", "calibration", "num_samples")
"""Of the method's configuration, what the measuring depends on."""


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """What of the method's configuration enters the digest."""
    return {key: config[key] for key in KEYS}


def build(context: BuildContext) -> None:
    """Writes `sites/`, a file for each site, and `sites.json`, errors and columns for people to read.

    An interrupted build goes on with the sites that are missing.
    """
    from compress.flattenquant.choice import BITS
    from compress.flattenquant.method import measure_sites
    from compress.flattenquant.site_files import read_options

    config, samples, target = context.config, calibration_ids(context), context.inputs["target"] / "model"
    directory = context.out / FILES
    directory.mkdir(exist_ok=True)
    with context.progress(num_layers(target), f"errors by site on {len(samples)} samples", "layers") as bar:
        measure_sites(target, samples, _rule(config), directory, alpha=config["alpha"], on_layers=bar.update)
    told = {}
    for path in sorted(directory.glob("*.safetensors")):
        options = read_options(path)
        told[path.stem] = {f"error_{bits}": options.errors[bits] for bits in BITS}
        told[path.stem] |= {f"columns_{bits}": len(options.splits[bits].index) for bits in BITS}
    (context.out / "sites.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    errors = sorted(site["error_4"] for site in told.values())
    context.summary.update(
        {"num_sites": len(told), "error_4_median": errors[len(errors) // 2], "error_4_worst": errors[-1]}
    )


def flattenquant(context: BuildContext, target: Path, source: Source) -> QuantizedLayers:
    """The method of quantize that reads this artifact: FlattenQuant, and its solver on the flattened weights."""
    from compress.flattenquant.bits import BitsRule
    from compress.flattenquant.method import SolverRule
    from compress.flattenquant.method import flattenquant as method

    config, samples = context.config, calibration_ids(context)
    bits = BitsRule(**{key: config[key] for key in ("criterion", "gamma", "int4_share")})
    solver = SolverRule(
        **{key: config[key] for key in ("solver", "dampening", "activation_order", "on_singular", "correct_inputs")}
    )
    sites = context.inputs["sites"] / FILES
    with context.progress(num_layers(target), f"FlattenQuant on {len(samples)} samples", "layers") as bar:
        return method(
            target,
            samples,
            _rule(config),
            sites,
            bits,
            solver,
            alpha=config["alpha"],
            on_layers=bar.update,
            finished=finished_blocks(context),
        )


def _rule(config: dict[str, Any]) -> FlattenRule:
    """What of the method's configuration says how sites are split."""
    from compress.flattenquant.choice import FlattenRule

    weights = config["weights"]
    return FlattenRule(
        group_size=weights["group_size"],
        symmetric=weights["symmetric"],
        observer=OBSERVERS[weights["observer"]],
        **{key: config[key] for key in ("beta", "threshold", "max_expansion")},
    )
