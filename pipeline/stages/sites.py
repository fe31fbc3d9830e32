"""sites: what FlattenQuant can do with every site of a model, measured once for all shares, criteria and solvers."""

from __future__ import annotations

import json
from typing import Any

from pipeline.graph import BuildContext
from pipeline.stages.quantize_inputs import SITE_FILES, calibration_ids, flatten_rule, num_layers

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
    directory = context.out / SITE_FILES
    directory.mkdir(exist_ok=True)
    with context.progress(num_layers(target), f"errors by site on {len(samples)} samples", "layers") as bar:
        measure_sites(target, samples, flatten_rule(config), directory, alpha=config["alpha"], on_layers=bar.update)
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
