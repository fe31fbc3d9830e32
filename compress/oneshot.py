"""GPTQ and round-to-nearest by llmcompressor, from a model directory to grids.

The library's own recipes do the work; this file only feeds them and reads the result. Deviations from its defaults:
scales are rounded to bfloat16 *before* the codes are chosen, so that the file holds exactly what was optimised, and
layers whose Hessian cannot be inverted are an error or a counted fallback, by policy.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle import apply
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import State, reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger as library_logger
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.grids import QuantizedLayers, WeightGrid
from deploy.formats.packed import GroupedInt

IGNORED = ["lm_head", "re:.*embed_tokens"]
SingularPolicy = Literal["error", "rtn"]


class CountingGPTQ(GPTQModifier):
    """llmcompressor's GPTQ, with a record of the layers that fell back to rounding and a report of progress."""

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        _fallen_back.extend(self._rtn_fallback_module_names)
        return super().on_finalize(state, **kwargs)

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        for module in module_list:
            observer: Any = module.weight_observer
            num_samples = self._num_samples[module].clone()
            extremes = observer.min_vals, observer.max_vals
            try:
                super().compress_module_list([module])
            except torch.linalg.LinAlgError:
                # The library falls back when H has no factor, but not when only its inverse has none. Under an
                # identity nothing is passed on from column to column, which is rounding to nearest.
                self._hessians[module] = torch.eye(module.get_parameter("weight").shape[1])
                self._num_samples[module] = num_samples
                observer.min_vals, observer.max_vals = extremes
                super().compress_module_list([module])
                self._rtn_fallback_module_names.append(self._module_names[module])
            _on_layers(1)


_fallen_back: list[str] = []
"""Modifiers are built anew from their recipe inside the library, so what they saw is handed out here."""
_on_layers: Callable[[int], None] = lambda num_layers: None  # noqa: E731


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
) -> QuantizedLayers:
    """GPTQ (arXiv 2210.17323) of every linear layer but the head, layer by layer on the quantized predecessors.

    samples: calibration token ids. observer: llmcompressor's rule for the grid's range. dampening: fraction of the
    Hessian's mean diagonal. on_layers: called with the number of layers just done.
    Raises ValueError when a Hessian is singular and on_singular is "error".
    """
    recipe = CountingGPTQ(
        config_groups={"group_0": _scheme(grid, observer)},
        ignore=IGNORED,
        dampening_frac=dampening,
        actorder="static" if activation_order else None,
    )
    model = _load(model_dir)
    fallen_back = _run(model, recipe, samples, on_layers)
    if fallen_back and on_singular == "error":
        raise ValueError(
            f"quantize.on_singular=error: {len(fallen_back)} layers have a singular Hessian ({fallen_back[0]}, …);"
            " calibrate on more samples, raise quantize.dampening, or choose on_singular=rtn"
        )
    fallbacks = {"singular Hessian, rounded to nearest": fallen_back} if fallen_back else {}
    return QuantizedLayers(_read_grids(model, grid), fallbacks)


def rtn(model_dir: Path, grid: WeightGrid, *, observer: str) -> QuantizedLayers:
    """Every weight rounded to the nearest code of its group's grid; needs no calibration."""
    model = _load(model_dir)
    _run(model, QuantizationModifier(config_groups={"group_0": _scheme(grid, observer)}, ignore=IGNORED), None, None)
    return QuantizedLayers(_read_grids(model, grid))


def _scheme(grid: WeightGrid, observer: str) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.GROUP,
        group_size=grid.group_size,
        observer=observer,
        scale_dtype=torch.bfloat16,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _load(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def _run(
    model: PreTrainedModel,
    modifier: Modifier,
    samples: Sequence[Sequence[int]] | None,
    on_layers: Callable[[int], None] | None,
) -> list[str]:
    """Runs one recipe; returns the layers that fell back. The library's session is global: it is reset either way."""
    global _on_layers
    _fallen_back.clear()
    _on_layers = on_layers or (lambda _num_layers: None)
    for package in ("llmcompressor", "compressed_tensors"):
        library_logger.disable(package)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    reset_session()
    arguments: dict[str, Any] = {}
    if samples is not None:
        columns = {"input_ids": [list(s) for s in samples], "attention_mask": [[1] * len(s) for s in samples]}
        arguments = {
            "dataset": Dataset.from_dict(columns),
            "num_calibration_samples": len(samples),
            "max_seq_length": max(len(s) for s in samples),
            "shuffle_calibration_samples": False,
            "batch_size": 1,
        }
    try:
        # Its bar is shown even where TQDM_DISABLE asks for none; ours says more.
        with patch.object(apply, "tqdm", lambda items, **_bar: items):
            oneshot(model=model, recipe=[modifier], **arguments)
    finally:
        reset_session()
    return list(_fallen_back)


def _read_grids(model: PreTrainedModel, grid: WeightGrid) -> dict[str, GroupedInt]:
    """Codes, scales and zero points from the modules that llmcompressor leaves behind."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not hasattr(module, "weight_scale"):
            continue
        scale = module.get_parameter("weight_scale").detach().float()
        zero = torch.zeros_like(scale) if grid.symmetric else module.get_parameter("weight_zero_point").detach().float()
        weight = module.weight.detach().float().unflatten(1, (-1, grid.group_size))
        middle, top = 1 << (grid.bits - 1), (1 << grid.bits) - 1
        codes = (torch.round(weight / scale[:, :, None] + zero[:, :, None]) + middle).clamp(0, top)
        found[name] = GroupedInt.from_zero_point(
            codes.flatten(1).numpy().astype(np.uint8),
            scale.numpy(),
            (zero + middle).numpy().astype(np.uint8),
            bits=grid.bits,
            group_size=grid.group_size,
        )
    return found
