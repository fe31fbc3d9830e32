"""Each quantized layer on its own: its output against the unquantized layer's, on the unquantized model's inputs.

A smoothed model's layers have other inputs, so they are compared on the smoothed target: the target with the model's
norms, and with columns that take back what the norms do not do any more.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from compress.quantized_inputs import QuantizedInputs
from compress.row_errors import squared_row_errors
from compress.sites import readers
from deploy.formats.activations import LayerInputs
from deploy.formats.packed import GroupedInt


@dataclass(frozen=True)
class LayerError:
    """One layer. error: of its output, root mean square over tokens of ‖y − ŷ‖ / ‖y‖; inputs_error: of its input.

    saturation: share of input values beyond what the layer can hold; None where scales come with the rows.
    """

    error: float
    inputs_error: float
    saturation: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class _Sums:
    """Squared errors and counts over the tokens so far."""

    def __init__(self, weight: GroupedInt, inputs: LayerInputs) -> None:
        self.weight = weight
        self.expand = QuantizedInputs(inputs)
        self.output_error = self.input_error = 0.0
        self.num_tokens = self.num_values = self.num_saturated = 0

    def add(self, x: Tensor, exact: Tensor, bias: Tensor | None) -> None:
        quantized, weight = self.expand(x), torch.from_numpy(self.weight.dequantize())  # anew: all of them are a model
        self.output_error += float(squared_row_errors(exact, linear(quantized, weight, bias)).sum())
        index = self.expand.index
        held = quantized if index is None else torch.zeros_like(x).index_add_(-1, index, quantized)
        self.input_error += float(squared_row_errors(x, held).sum())
        self.num_tokens += x.shape[:-1].numel()
        self.num_values += x.numel()
        if self.expand.inputs.scale is not None:
            self.num_saturated += int(self.expand.saturated(x).sum())

    def found(self) -> LayerError:
        saturation = None if self.expand.inputs.scale is None else self.num_saturated / self.num_values
        output, inputs = (math.sqrt(total / self.num_tokens) for total in (self.output_error, self.input_error))
        return LayerError(output, inputs, saturation)


@torch.inference_mode()
def measure_layers(
    target: PreTrainedModel,
    layers: Mapping[str, GroupedInt],
    inputs: Mapping[str, LayerInputs],
    sequences: Iterable[Sequence[int]],
    *,
    on_sequences: Callable[[int], None] = lambda _num: None,
) -> dict[str, LayerError]:
    """Module name → error, for the layers of `inputs`.

    target: in float32, smoothed as the layers are. sequences: token ids, held out. on_sequences: called with the number
    just done.
    """
    sums = {name: _Sums(layers[name], inputs[name]) for name in inputs}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            sums[name].add(arguments[0], output, module.bias)

        return hook

    handles = [target.get_submodule(name).register_forward_hook(watch(name)) for name in sums]
    try:
        for sequence in sequences:
            target.model(torch.tensor([list(sequence)]), use_cache=False)
            on_sequences(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: each.found() for name, each in sums.items()}


@torch.no_grad()
def smooth_as(model: nn.Module, norms: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Puts smoothed norms into an unquantized model and what they lack into the columns that read them, in place.

    norms: tensor name → weight. The model computes what it did.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for tensor_name, smoothed in norms.items():
        parameter, new = model.get_parameter(tensor_name), torch.from_numpy(smoothed)
        ratio = torch.where(new == 0, torch.ones_like(new), parameter / new)
        parameter.copy_(new)
        for name in readers(tensor_name.removesuffix(".weight"), names):
            model.get_submodule(name).get_parameter("weight").mul_(ratio)
