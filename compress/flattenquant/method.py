"""FlattenQuant from a model directory to grids: measure sites; then decide, flatten and round the flattened layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel

from compress.flattenquant.bits import BitsRule
from compress.flattenquant.choice import BITS
from compress.flattenquant.modifier import FlattenedGPTQ, FlattenLinear, FlattenQuantModifier
from compress.flattenquant.splits import FlattenRule
from compress.flattenquant.watcher import SiteWatcher
from compress.grids import QuantizedLayers, WeightGrid
from compress.oneshot import SingularPolicy, counted_fallbacks
from compress.recipes import load_model, read_grids, run_recipe, weight_scheme
from compress.smoothquant import Solver, norm_weights, smooth

INNER = ".inner"


@dataclass(frozen=True)
class SolverRule:
    """How the flattened weights get their codes: by GPTQ, or to the nearest, which needs nothing of the following.

    dampening: fraction of the Hessian's mean diagonal. correct_inputs: whether weights first make up for what rounding
    takes from their inputs (`correction`).
    """

    solver: Solver
    dampening: float
    activation_order: bool
    on_singular: SingularPolicy
    correct_inputs: bool


def measure_sites(
    model_dir: Path,
    samples: Sequence[Sequence[int]],
    rule: FlattenRule,
    directory: Path,
    *,
    alpha: float | None,
    on_layers: Callable[[int], None],
) -> None:
    """What every site can have with 4 bits and with 8, as files in `directory` (`site_files`); those there stay.

    samples: calibration token ids. alpha: SmoothQuant's strength, where channels are smoothed before they are split.
    on_layers: called with the number of layers just done.
    """
    model, _ = _smoothed(model_dir, samples, alpha)
    watcher = SiteWatcher(rule=rule, num_samples=len(samples), directory=directory)
    run_recipe(model, watcher, samples, on_layers, only_watches=True)


def flattenquant(
    model_dir: Path,
    samples: Sequence[Sequence[int]],
    rule: FlattenRule,
    sites: Path,
    bits: BitsRule,
    solver: SolverRule,
    *,
    alpha: float | None,
    on_layers: Callable[[int], None],
    finished: Path | None = None,
) -> QuantizedLayers:
    """A model whose layers have 4- or 8-bit weights and inputs, every input with one scale for its whole layer.

    samples, rule, alpha: those of `measure_sites`, which left its files in `sites`. on_layers: called with the number
    of layers just done. finished: where GPTQ's blocks that are done are kept (CountingGPTQ). Raises SettingError when a
    Hessian is singular and solver.on_singular is "error".
    """
    model, norms = _smoothed(model_dir, samples, alpha)
    run_recipe(model, FlattenQuantModifier(rule=bits, sites=sites))
    flattened = {name: module for name, module in model.named_modules() if isinstance(module, FlattenLinear)}
    fields: dict[str, Any] = {"config_groups": _groups(flattened, rule), "ignore": ["lm_head"]}
    if solver.solver == "rtn":
        fallen_back = run_recipe(model, QuantizationModifier(**fields))
    else:
        actorder = "static" if solver.activation_order else None
        recipe = FlattenedGPTQ(
            **fields,
            dampening_frac=solver.dampening,
            actorder=actorder,
            stops_at_fallback=solver.on_singular == "error",
            correct_inputs=solver.correct_inputs,
            finished=finished,
        )
        fallen_back = [name.removesuffix(INNER) for name in run_recipe(model, recipe, samples, on_layers)]
    return QuantizedLayers(
        {name.removesuffix(INNER): weight for name, weight in read_grids(model).items()},
        counted_fallbacks(fallen_back),
        inputs={name: module.expand.inputs for name, module in flattened.items()},
        norms=norms,
        notes={
            "alpha": alpha,
            "gamma": next(iter(flattened.values())).flattening.gamma,
            "choice": {name: _choice(module) for name, module in flattened.items()},
        },
    )


def _smoothed(
    model_dir: Path, samples: Sequence[Sequence[int]], alpha: float | None
) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """The model, and what its norms have become; none where alpha is None."""
    model = load_model(model_dir)
    if alpha is None:
        return model, {}
    smooth(model, samples, alpha)
    return model, norm_weights(model)


def _groups(flattened: dict[str, FlattenLinear], rule: FlattenRule) -> dict[str, Any]:
    """The recipe's groups, one for each number of bits that occurs."""
    groups = {}
    for bits in BITS:
        targets = [name + INNER for name, module in flattened.items() if module.flattening.bits == bits]
        if targets:
            grid = WeightGrid(bits, rule.group_size, rule.symmetric)
            groups[f"bits_{bits}"] = weight_scheme(grid, rule.observer, targets)
    return groups


def _choice(module: FlattenLinear) -> dict[str, float | None]:
    """Why a layer got its bits: threshold, columns and error of its site with either number of them.

    correction_dampening: of its weights' correction; None without one.
    """
    found, options = module.flattening, module.flattening.options
    told: dict[str, float | None] = {"bits": found.bits, "correction_dampening": module.correction_dampening}
    for bits, split in options.splits.items():
        told |= {
            f"threshold_{bits}": split.threshold,
            f"columns_{bits}": len(split.index),
            f"error_{bits}": options.errors[bits],
        }
    return told
