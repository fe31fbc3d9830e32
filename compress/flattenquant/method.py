"""FlattenQuant from a model directory to grids: watch and decide, flatten, then GPTQ on the flattened layers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.flattenquant.choice import BITS, FlattenRule
from compress.flattenquant.modifier import FlattenLinear, FlattenQuantModifier
from compress.grids import QuantizedLayers, WeightGrid
from compress.oneshot import SingularPolicy, counted_fallbacks
from compress.recipes import CountingGPTQ, load_model, read_grids, run_recipe, weight_scheme
from compress.smoothquant import norm_weights, smooth

INNER = ".inner"


@dataclass(frozen=True)
class SolverRule:
    """How the flattened weights are quantized: GPTQ, their range by llmcompressor's `observer`."""

    symmetric: bool
    observer: str
    dampening: float
    activation_order: bool
    on_singular: SingularPolicy


def flattenquant(
    model_dir: Path,
    samples: Sequence[Sequence[int]],
    rule: FlattenRule,
    solver: SolverRule,
    *,
    alpha: float | None,
    on_layers: Callable[[int], None],
) -> QuantizedLayers:
    """A model whose layers have 4- or 8-bit weights and inputs, every input with one scale for its whole layer.

    samples: calibration token ids. alpha: SmoothQuant's strength, where channels are smoothed before they are split.
    on_layers: called with the number of layers just done. Raises SettingError when a Hessian is singular and
    solver.on_singular is "error".
    """
    model = load_model(model_dir)
    norms = {}
    if alpha is not None:
        smooth(model, samples, alpha)
        norms = norm_weights(model)
    run_recipe(model, FlattenQuantModifier(**asdict(rule), num_samples=len(samples)), samples)
    flattened = {name: module for name, module in model.named_modules() if isinstance(module, FlattenLinear)}
    recipe = CountingGPTQ(
        config_groups=_groups(flattened, rule, solver),
        ignore=["lm_head"],
        dampening_frac=solver.dampening,
        actorder="static" if solver.activation_order else None,
        keeps_unseen=True,  # a copy that calibration never filled is there for what may come
    )
    fallen_back = [name.removesuffix(INNER) for name in run_recipe(model, recipe, samples, on_layers)]
    return QuantizedLayers(
        {name.removesuffix(INNER): weight for name, weight in read_grids(model).items()},
        counted_fallbacks(fallen_back, solver.on_singular),
        inputs={name: module.expand.inputs for name, module in flattened.items()},
        norms=norms,
        notes={"alpha": alpha, "choice": {name: _choice(module) for name, module in flattened.items()}},
    )


def _groups(flattened: dict[str, FlattenLinear], rule: FlattenRule, solver: SolverRule) -> dict[str, Any]:
    """The recipe's groups, one for each number of bits that occurs."""
    groups = {}
    for bits in BITS:
        targets = [name + INNER for name, module in flattened.items() if module.flattening.bits == bits]
        if targets:
            grid = WeightGrid(bits, rule.group_size, solver.symmetric)
            groups[f"bits_{bits}"] = weight_scheme(grid, solver.observer, targets)
    return groups


def _choice(module: FlattenLinear) -> dict[str, float]:
    """Why a layer got its bits: errors and threshold of its site."""
    found = module.flattening
    return {
        "bits": found.bits,
        "threshold": found.threshold,
        **{f"error_{bits}": error for bits, error in found.errors.items()},
    }
