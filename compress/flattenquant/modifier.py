"""FlattenQuant as a modifier of llmcompressor: it watches inputs, decides, and puts FlattenLinear where nn.Linear was.

All modifiers of a recipe are initialized before any calibration, so one that makes modules needs a oneshot of its own
before GPTQ's. GPTQ then finds `inner`, whose inputs are the quantized copies that the runtime will compute.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import Tensor, nn

from compress.flattenquant.choice import Criterion, Flattening, FlattenRule, decide
from compress.quantized_inputs import InputQuantizedLinear, QuantizedInputs, linear_with
from compress.sites import input_sites
from deploy.formats.activations import ActivationGrid, LayerInputs

ROWS_PER_SITE = 256
"""Inputs on which a site's errors are measured, the same number from every sample, none of them a sample's first."""


class FlattenLinear(InputQuantizedLinear):
    """A linear layer whose inputs `expand` flattens and quantizes, and whose `inner` has the repeated columns."""

    def __init__(self, linear: nn.Linear, flattening: Flattening) -> None:
        grid = ActivationGrid(4 if flattening.bits == 4 else 8, "tensor")
        index = flattening.index.numpy().astype(np.int32)
        inputs = LayerInputs(grid, float(np.float32(flattening.scale)), index)
        weight = linear.weight.data[:, flattening.index].contiguous()
        super().__init__(
            QuantizedInputs(inputs), linear_with(weight, None if linear.bias is None else linear.bias.data)
        )
        self.flattening = flattening


class _Inputs:
    """What is known of a site's inputs: the largest value of each channel, and some rows."""

    def __init__(self) -> None:
        self.channel_max: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, num_rows: int) -> None:
        """x: [tokens, C], of which `num_rows` are kept, evenly spread.

        The first token's, which is like no other, is not kept where there is another.
        """
        found = x.abs().amax(0)
        self.channel_max = found if self.channel_max is None else torch.maximum(self.channel_max, found)
        later = x[1:] if len(x) > 1 else x
        num_kept = min(num_rows, len(later))
        places = (2 * torch.arange(num_kept) + 1) * len(later) // (2 * num_kept)
        self.rows.append(later[places].clone())


class FlattenQuantModifier(Modifier):
    """Flattens every linear layer but the head. Fields as of FlattenRule; num_samples: of the calibration."""

    requires_calibration_data: bool = True
    beta: float
    max_expansion: float
    criterion: Criterion
    gamma: float
    group_size: int | None
    num_samples: int

    _sites: list[tuple[str, ...]] = PrivateAttr(default_factory=list)
    _inputs: dict[str, _Inputs] = PrivateAttr(default_factory=dict)
    _decided: dict[str, Flattening] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        names = [
            n for n, m in state.model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")
        ]
        self._sites = input_sites(names)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for first, *_ in self._sites:
            self._inputs[first] = _Inputs()
            self.register_hook(state.model.get_submodule(first), self._watch(first), "forward")

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        """Decides the sites that the samples have passed, so that their rows need not be kept."""
        rule = FlattenRule(self.beta, self.max_expansion, self.criterion, self.gamma, self.group_size)
        for first, *others in self._sites:
            seen = self._inputs.get(first)
            if seen is None or seen.channel_max is None:
                continue
            weights = [state.model.get_submodule(name).get_parameter("weight").data for name in (first, *others)]
            self._decided[first] = decide(seen.channel_max, torch.cat(seen.rows), weights, rule)
            del self._inputs[first]

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        for site in self._sites:
            for name in site:
                linear: Any = state.model.get_submodule(name)
                state.model.set_submodule(name, FlattenLinear(linear, self._decided[site[0]]))

    def _watch(self, name: str) -> Callable[..., None]:
        rows_per_sample = -(-ROWS_PER_SITE // self.num_samples)

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
            self._inputs[name].add(arguments[0].detach().flatten(0, -2), rows_per_sample)

        return hook
