"""SmoothQuant (arXiv 2211.10438) by llmcompressor: input outliers moved into weights, then both quantized.

s_j = max|X_j|^α / max|W_j|^(1−α) per input channel, folded into the norm before; by llmcompressor's mappings of these
architectures that is the input of q, k, v and of gate, up. o_proj and down_proj have no norm before them and stay.
Deviations: the library takes a channel's range for max|X_j| and twice max|W_j|, which for symmetric inputs is 2^(2α−1)
times the paper's s_j, a constant that the norm takes back; α is the one of a list whose model is nearest to the target.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import PreTrainedModel

from compress.counting_gptq import CountingGPTQ
from compress.grids import QuantizedLayers, WeightGrid
from compress.oneshot import SingularPolicy, counted_fallbacks
from compress.quality import measure
from compress.quantized_inputs import quantize_layers
from compress.recipes import IGNORED, load_model, read_grids, run_recipe, weight_scheme
from deploy.formats.activations import ActivationGrid, LayerInputs

Solver = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class SmoothQuantRule:
    """What is quantized how. solver: of the weights' codes; observer: llmcompressor's rule for their range."""

    weights: WeightGrid
    activations: ActivationGrid
    solver: Solver
    observer: str
    dampening: float
    activation_order: bool
    on_singular: SingularPolicy


def smoothquant(
    model_dir: Path,
    samples: Sequence[Sequence[int]],
    rule: SmoothQuantRule,
    *,
    alphas: Sequence[float],
    choice_samples: Sequence[Sequence[int]],
    on_layers: Callable[[int], None],
    finished: Path | None = None,
) -> QuantizedLayers:
    """A smoothed and quantized model.

    samples: calibration token ids. alphas: to choose from, by KL(target ‖ model) on `choice_samples`, on which these
    candidates are also calibrated, with weights rounded to nearest; no choice is made among one. on_layers: called with
    the number of layers that GPTQ just did. finished: where its blocks that are done are kept (CountingGPTQ).
    Raises SettingError when a Hessian is singular and rule.on_singular is "error".
    """
    candidates = alphas if len(alphas) > 1 else []
    divergences = {alpha: _divergence(model_dir, choice_samples, rule, alpha) for alpha in candidates}
    alpha = min(divergences, key=lambda each: divergences[each], default=alphas[0])
    model = load_model(model_dir)
    smooth(model, samples, alpha)
    blocks = None if finished is None else finished / f"alpha {alpha}"  # another one's weights would not fit
    fallen_back = _quantize(model, rule, rule.solver, samples, on_layers, blocks)
    return QuantizedLayers(
        read_grids(model),
        counted_fallbacks(fallen_back),
        inputs=read_inputs(model, rule.activations),
        norms=norm_weights(model),
        notes={"alpha": alpha, "alpha_kl": {str(key): value for key, value in divergences.items()}},
    )


def smooth(model: PreTrainedModel, samples: Sequence[Sequence[int]], alpha: float) -> None:
    """Smooths the model in place; it computes what it did. alpha: from 0, nothing of the inputs' range, to 1, all."""
    # A smoothed layer passes on what it did, so none need run again for it.
    run_recipe(model, SmoothQuantModifier(smoothing_strength=alpha), samples, only_watches=True)


def _quantize(
    model: PreTrainedModel,
    rule: SmoothQuantRule,
    solver: Solver,
    samples: Sequence[Sequence[int]],
    on_layers: Callable[[int], None] | None = None,
    finished: Path | None = None,
) -> list[str]:
    """In place; the layers that fell back. Samples are run only where something is learnt from them."""
    learns = solver == "gptq" or rule.activations.scope == "tensor" or rule.observer == "imatrix_mse"
    return run_recipe(model, recipe_modifier(rule, solver, finished), samples if learns else None, on_layers)


def norm_weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Weights of the norms into which smoothing is folded, by tensor name."""
    kinds = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters() if name.endswith(kinds)}


def read_inputs(model: PreTrainedModel, grid: ActivationGrid) -> dict[str, LayerInputs]:
    """How every quantized layer's inputs are quantized; static scales as llmcompressor observed them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale"):
            scale = float(module.get_parameter("input_scale")) if grid.scope == "tensor" else None
            found[name] = LayerInputs(grid, scale, None)
    return found


def _divergence(model_dir: Path, samples: Sequence[Sequence[int]], rule: SmoothQuantRule, alpha: float) -> float:
    """KL(target ‖ model) on the samples, of the model that they and rounding give at `alpha`."""
    model = load_model(model_dir)
    smooth(model, samples, alpha)
    _quantize(model, rule, "rtn", samples)
    layers, inputs, norms = read_grids(model), read_inputs(model, rule.activations), norm_weights(model)
    del model
    gc.collect()  # it refers to itself, and three would not fit
    model = load_model(model_dir)
    for name, value in norms.items():
        model.get_parameter(name).data.copy_(torch.from_numpy(value))
    quantize_layers(model, layers, inputs)
    quality, _ = measure(load_model(model_dir).eval(), model.eval(), samples)
    return quality.kl


def recipe_modifier(rule: SmoothQuantRule, solver: Solver, finished: Path | None = None) -> Modifier:
    """What quantizes a smoothed model, or one that is not. finished: as of CountingGPTQ."""
    is_static = rule.activations.scope == "tensor"
    activations = QuantizationArgs(
        num_bits=rule.activations.bits,
        type="int",
        symmetric=True,
        strategy=QuantizationStrategy.TENSOR if is_static else QuantizationStrategy.TOKEN,
        dynamic=not is_static,
        **({"observer": "static_minmax"} if is_static else {}),
    )
    fields: dict[str, Any] = {
        "config_groups": {"group_0": weight_scheme(rule.weights, rule.observer, activations=activations)},
        "ignore": IGNORED,
    }
    if solver == "rtn":
        return QuantizationModifier(**fields)
    actorder = "static" if rule.activation_order else None
    stops = rule.on_singular == "error"
    fields |= {"dampening_frac": rule.dampening, "actorder": actorder}
    return CountingGPTQ(**fields, stops_at_fallback=stops, finished=finished)
