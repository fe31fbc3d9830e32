"""What every quantization method hands on: a grid per linear layer, and what went on while choosing it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import LayerInputs
from deploy.formats.architectures import ModelShape, linear_layers
from deploy.formats.packed import GroupedInt


@dataclass(frozen=True)
class WeightGrid:
    """The form of the quantized weights: bits, input channels per group, symmetric or with integer zero points.

    group_size: None for one scale per output channel.
    """

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass
class QuantizedLayers:
    """Result of a method. layers: module name → weight; layers that are not in it stay as they are.

    fallbacks: policy name → the layers it was applied to; every one is counted and shown in the report. inputs: module
    name → how the layer's inputs are quantized, where the method says so. norms: tensor name → the weight that replaces
    the target's. notes: what the method chose and why, for the report.
    """

    layers: dict[str, GroupedInt]
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    inputs: dict[str, LayerInputs] = field(default_factory=dict)
    norms: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def check_group_size(shape: ModelShape, group_size: int, key: str = "quantize") -> None:
    """Raises ValueError naming the layers whose input width is not a multiple of `group_size`, `key`.group_size."""
    misfits: dict[int, set[str]] = {}
    for layer in linear_layers(shape):
        if layer.num_in % group_size:
            pattern = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            misfits.setdefault(layer.num_in, set()).add(pattern)
    if not misfits:
        return
    widths = sorted({layer.num_in for layer in linear_layers(shape)})
    fitting = [str(size) for size in (128, 64, 32) if all(width % size == 0 for width in widths)]
    where = "; ".join(f"in_features={width} (layers: {', '.join(sorted(names))})" for width, names in misfits.items())
    remedy = f"use {' or '.join(fitting)}" if fitting else "this model's widths fit no supported group size"
    raise ValueError(f"{key}.group_size={group_size} does not divide {where}; {remedy}")
