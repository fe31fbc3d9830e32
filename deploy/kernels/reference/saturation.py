"""How often the inputs of layers with a static scale lie beyond it, over some text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import LayerInputs
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.reference.fp32 import Float32
from deploy.kernels.reference.model import ReferenceBackend
from deploy.kernels.reference.row_scales import round_to_grid
from deploy.runtime.backend import Row


@dataclass
class Saturation:
    """Input values of one layer, and how many of them were cut off; of a flattened one each counts once."""

    num_values: int = 0
    num_saturated: int = 0

    @property
    def share(self) -> float:
        return self.num_saturated / self.num_values if self.num_values else 0.0


def largest_codes(inputs: LayerInputs) -> npt.NDArray[np.int32] | int:
    """The largest code that a layer's columns can carry: of each channel [C] where it is flattened, else of all."""
    if inputs.flatten is None:
        return inputs.grid.qmax
    return (np.bincount(inputs.flatten) * inputs.grid.qmax).astype(np.int32)


def count_saturation(directory: ModelDirectory | str | Path, texts: Sequence[Sequence[int]]) -> dict[str, Saturation]:
    """Saturation of every linear layer with a static input scale, by its name, when the reference reads `texts`.

    texts: token ids, each read from an empty cache. Slow: the whole forward pass in numpy. Raises as ReferenceBackend.
    """
    opened = directory if isinstance(directory, ModelDirectory) else ModelDirectory.open(directory)
    static = {name: inputs for name in opened.layers if (inputs := opened.inputs(name)) and inputs.scale is not None}
    limits = {name: largest_codes(inputs) for name, inputs in static.items()}
    counts = {name: Saturation() for name in static}

    def watch(name: str, x: Float32) -> None:
        scale = static[name].scale if name in static else None
        if scale is not None:
            codes = round_to_grid(x, scale)
            counts[name].num_values += codes.size
            counts[name].num_saturated += int(np.count_nonzero(np.abs(codes) > limits[name]))

    backend = ReferenceBackend(opened, watch=watch)
    for text in texts:
        backend.forward([Row(token, i, 0, i - 1) for i, token in enumerate(text)], logit_rows=[])
        backend.keep(0, [])
    return counts
