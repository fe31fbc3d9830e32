"""Linear layers whose inputs are quantized, in torch: the codes of docs/numerics.md, as float32 values.

The codes are exactly the runtime's; the product with the weights is torch's own, so sums differ in their last bits.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compress.flattenquant.flatten import counts_of, flatten_codes
from deploy.formats.activations import LayerInputs
from deploy.formats.packed import GroupedInt

SMALLEST = 2.0**-100
"""Rows whose largest value is below it are 0 (docs/numerics.md)."""

INNER = ".inner."
"""Between a layer's name and its parameters', where its inputs are quantized."""


class QuantizedInputs(nn.Module):
    """What a layer's kernel makes of its inputs: codes times their scale, flattened where the layer is.

    Computes in float32 whatever the model's type is.
    """

    index: Tensor | None

    def __init__(self, inputs: LayerInputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.qmax = inputs.grid.qmax
        index = None if inputs.flatten is None else torch.from_numpy(inputs.flatten).long()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C]. Returns [..., C or C'] in x's type."""
        scale = self.inputs.scale
        values = self._by_row(x.float()) if scale is None else self._by_layer(x.float(), scale)
        return values.to(x.dtype)

    def saturated(self, x: Tensor) -> Tensor:
        """Which values of x [..., C] lie beyond what the layer can hold, as a bool tensor; scope "tensor" only."""
        assert self.inputs.scale is not None
        codes = static_codes(x.float(), self.inputs.scale).abs()
        return codes > (self.qmax if self.index is None else counts_of(self.index) * self.qmax)

    def _by_row(self, x: Tensor) -> Tensor:
        a = x.abs().amax(-1, keepdim=True)
        is_zero = a < SMALLEST
        safe = torch.where(is_zero, torch.ones_like(a), a)
        codes = torch.round(x * (self.qmax / safe))
        return torch.where(is_zero, torch.zeros_like(x), codes * (safe / self.qmax))

    def _by_layer(self, x: Tensor, scale: float) -> Tensor:
        codes = static_codes(x, scale)
        if self.index is None:
            return codes.clamp(-self.qmax, self.qmax) * scale
        return flatten_codes(codes, self.index, self.qmax) * scale


def static_codes(x: Tensor, scale: float) -> Tensor:
    """rint(x · (1/scale)) in float32, not clamped. scale: exact in float32."""
    return torch.round(x * float(np.float32(1) / np.float32(scale)))


class InputQuantizedLinear(nn.Module):
    """A linear layer behind `expand`. A parent of nn.Linear, not a subclass, which GPTQ's hooks would not find."""

    def __init__(self, expand: QuantizedInputs, inner: nn.Linear) -> None:
        super().__init__()
        self.expand, self.inner = expand, inner

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] as without quantization."""
        output: Tensor = self.inner(self.expand(x))
        return output


def linear_with(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of exactly these values, which it shares. weight: [out, in]; bias: [out] or None."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def quantize_layers(
    model: nn.Module, layers: Mapping[str, GroupedInt], inputs: Mapping[str, LayerInputs | None]
) -> None:
    """Puts the weights that `layers` (module name → weight) stand for into the model, in place.

    inputs: module name → how its inputs are quantized; those layers become InputQuantizedLinear.
    """
    for name, weight in layers.items():
        values = torch.from_numpy(weight.dequantize())
        module = model.get_submodule(name)
        quantized = inputs.get(name)
        if quantized is None:
            module.get_parameter("weight").data.copy_(values)
        else:
            bias = module.get_parameter("bias").data if getattr(module, "bias", None) is not None else None
            model.set_submodule(name, InputQuantizedLinear(QuantizedInputs(quantized), linear_with(values, bias)))
