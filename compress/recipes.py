"""Recipes of llmcompressor: running one over a model, and reading what it left behind.

The library's session is global and its recipes are copied, so this is the only place that touches either. Scales are
rounded to bfloat16 *before* the codes are chosen, so that the file holds exactly what was optimised. Everything runs on
the CPU, whatever the machine has: an accelerator would give other bits, and no key names the device.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.lifecycle import apply
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.observers import Observer
from llmcompressor.pipelines.data_free import pipeline as data_free
from llmcompressor.pipelines.sequential import pipeline as sequential
from loguru import logger as library_logger
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.grids import WeightGrid
from compress.quantized_inputs import linear_with
from deploy.formats.packed import GroupedInt

CPU = torch.device("cpu")
IGNORED = ["lm_head", "re:.*embed_tokens"]


_fallen_back: list[str] = []
"""Modifiers are built anew from their recipe inside the library, so what they saw is handed out here."""
_on_layers: Callable[[int], None] = lambda num_layers: None  # noqa: E731


def report_layers(num_layers: int) -> None:
    """For modifiers: so many layers are done, for the progress of the run they are in."""
    _on_layers(num_layers)


def report_fallen_back(names: Sequence[str]) -> None:
    """For modifiers: what `run_recipe` returns."""
    _fallen_back.extend(names)


def weight_scheme(
    grid: WeightGrid,
    observer: str,
    targets: Sequence[str] = ("Linear",),
    activations: QuantizationArgs | None = None,
) -> QuantizationScheme:
    """A group of a recipe: weights on `grid`, their range by the library's `observer`, inputs as `activations` says."""
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.CHANNEL if grid.group_size is None else QuantizationStrategy.GROUP,
        group_size=grid.group_size,
        observer=observer,
        scale_dtype=torch.bfloat16,
    )
    return QuantizationScheme(targets=list(targets), weights=weights, input_activations=activations)


@torch.no_grad()
def rounded(weight: Tensor, inputs: Tensor, grid: WeightGrid, observer: str) -> Tensor:
    """A weight [out, in] as a recipe without GPTQ writes it: each value at the nearest code of its group's grid.

    inputs: [rows, in], of which an observer that weighs by inputs takes the squares; the others look at none. Returns
    what the codes stand for, float32 [out, in].
    """
    layer, arguments = linear_with(weight, None), weight_scheme(grid, observer).weights
    observes: Any = Observer.load_from_registry(observer, base_name="weight", args=arguments)
    observes.attach(layer)
    layer(inputs)
    observes.detach(layer)
    found = observes(weight).get_qparams()
    return fake_quantize(weight, found["scale"].float(), found["zero_point"].float(), arguments)


def load_model(model_dir: Path) -> PreTrainedModel:
    """An unquantized model directory in float32."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def run_recipe(
    model: PreTrainedModel,
    modifier: Modifier,
    samples: Sequence[Sequence[int]] | None = None,
    on_layers: Callable[[int], None] | None = None,
    *,
    only_watches: bool = False,
) -> list[str]:
    """Runs one modifier over the model, in place; returns the layers that fell back.

    samples: calibration token ids, where it calibrates. on_layers: called with the number of layers that are just done.
    only_watches: the modifier changes nothing before all samples have passed, so each layer need not run again to find
    what it passes on.
    """
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
            "propagate_error": not only_watches,
        }
    try:
        # Its bar is shown even where TQDM_DISABLE asks for none; ours says more.
        with patch.object(apply, "tqdm", lambda items, **_bar: items), on_cpu():
            oneshot(model=model, recipe=[modifier], **arguments)
    finally:
        reset_session()
    return list(_fallen_back)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within it, the library's pipelines leave a model on the CPU.

    Otherwise they set the machine's accelerator as the device on which every parameter is read, then and later.
    """
    with (
        patch.object(data_free, "get_main_device", lambda: CPU),
        patch.object(sequential, "get_main_device", lambda: CPU),
    ):
        yield


def read_grids(model: PreTrainedModel) -> dict[str, GroupedInt]:
    """Codes, scales and zero points from the modules that llmcompressor leaves behind, by module name."""
    return {
        name: grid_of(module, codes_of(module))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale")
    }


def codes_of(module: torch.nn.Linear) -> npt.NDArray[np.uint8]:
    """Codes [out, in] of one such module's weight: of its values on the grid, or of those nearest to them."""
    scale, zero, grid = _grid(module)
    middle, top = 1 << (grid.num_bits - 1), (1 << grid.num_bits) - 1
    weight = module.weight.detach().float().unflatten(1, (scale.shape[1], -1))
    codes = (torch.round(weight / scale[:, :, None] + zero[:, :, None]) + middle).clamp(0, top)
    return codes.flatten(1).numpy().astype(np.uint8)


def grid_of(module: torch.nn.Linear, codes: npt.NDArray[np.uint8]) -> GroupedInt:
    """The weight with these codes on one such module's grid."""
    scale, zero, grid = _grid(module)
    zero_point = (zero + (1 << (grid.num_bits - 1))).numpy().astype(np.uint8)
    group_size = grid.group_size or module.in_features
    return GroupedInt.from_zero_point(codes, scale.numpy(), zero_point, bits=grid.num_bits, group_size=group_size)


def _grid(module: torch.nn.Linear) -> tuple[Tensor, Tensor, QuantizationArgs]:
    """Scales and zero points, each [out, groups], and what kind of grid it is. The library's codes are signed."""
    scheme: Any = module.quantization_scheme
    scale = module.get_parameter("weight_scale").detach().float()
    if scheme.weights.symmetric:
        return scale, torch.zeros_like(scale), scheme.weights
    return scale, module.get_parameter("weight_zero_point").detach().float(), scheme.weights
