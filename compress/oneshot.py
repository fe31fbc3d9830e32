"""GPTQ and round-to-nearest by llmcompressor, from a model directory to grids.

The library's own recipes do the work; this file only feeds them and reads the result. Deviations from its defaults:
scales are rounded to bfloat16 *before* the codes are chosen, and layers whose Hessian cannot be inverted are an error
or a counted fallback, by policy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from llmcompressor.modifiers.quantization import QuantizationModifier

from compress.counting_gptq import CountingGPTQ
from compress.grids import QuantizedLayers, WeightGrid
from compress.recipes import IGNORED, load_model, read_grids, run_recipe, weight_scheme

SingularPolicy = Literal["error", "rtn"]


def gptq(
    model_dir: Path,
    samples: Sequence[Sequence[int]],
    grid: WeightGrid,
    *,
    observer: str,
    dampening: float,
    activation_order: bool,
    on_singular: SingularPolicy,
    on_layers: Callable[[int], None],
    finished: Path | None = None,
) -> QuantizedLayers:
    """GPTQ (arXiv 2210.17323) of every linear layer but the head, layer by layer on the quantized predecessors.

    samples: calibration token ids. observer: llmcompressor's rule for the grid's range. dampening: fraction of the
    Hessian's mean diagonal. on_layers: called with the number of layers just done. finished: where blocks that are done
    are kept (CountingGPTQ).
    Raises SettingError when a Hessian is singular and on_singular is "error".
    """
    recipe = CountingGPTQ(
        config_groups={"group_0": weight_scheme(grid, observer)},
        ignore=IGNORED,
        dampening_frac=dampening,
        actorder="static" if activation_order else None,
        stops_at_fallback=on_singular == "error",
        finished=finished,
    )
    model = load_model(model_dir)
    fallen_back = run_recipe(model, recipe, samples, on_layers)
    return QuantizedLayers(read_grids(model), counted_fallbacks(fallen_back))


def rtn(model_dir: Path, grid: WeightGrid, *, observer: str) -> QuantizedLayers:
    """Every weight rounded to the nearest code of its group's grid; needs no calibration."""
    model = load_model(model_dir)
    run_recipe(model, QuantizationModifier(config_groups={"group_0": weight_scheme(grid, observer)}, ignore=IGNORED))
    return QuantizedLayers(read_grids(model))


def counted_fallbacks(fallen_back: list[str]) -> dict[str, list[str]]:
    """Policy name → the layers that fell back."""
    return {"singular Hessian, rounded to nearest": fallen_back} if fallen_back else {}
