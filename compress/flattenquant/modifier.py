"""FlattenQuant as modifiers of llmcompressor: one puts FlattenLinear where nn.Linear was, one is its GPTQ.

All modifiers of a recipe are initialized before any calibration, so one that makes modules needs a oneshot of its own
before GPTQ's. GPTQ then finds `inner`, whose inputs are the quantized copies that the runtime will compute. What the
first decides by was measured before, by a third (`watcher`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import Tensor, nn

from compress.counting_gptq import CountingGPTQ
from compress.finished_blocks import Notes
from compress.flattenquant.bits import BitsRule, Cost, criterion_value
from compress.flattenquant.choice import Flattening, SiteOptions
from compress.flattenquant.correction import MULTIPLES, Products, best_dampening, weight_change
from compress.flattenquant.flatten import copy_numbers
from compress.flattenquant.site_files import read_options, site_file
from compress.flattenquant.watcher import linear_sites
from compress.quantized_inputs import InputQuantizedLinear, QuantizedInputs, linear_with
from compress.sites import input_sites
from deploy.formats.activations import ActivationGrid, LayerInputs


class FlattenLinear(InputQuantizedLinear):
    """A linear layer whose inputs `expand` flattens and quantizes, and whose `inner` has the repeated columns.

    correction_dampening: of the correction that `inner` got (`correction`); None before or without one.
    """

    def __init__(self, linear: nn.Linear, flattening: Flattening) -> None:
        grid = ActivationGrid(4 if flattening.bits == 4 else 8, "tensor")
        index = flattening.split.index
        inputs = LayerInputs(grid, float(np.float32(flattening.scale)), index.numpy().astype(np.int32))
        weight = linear.weight.data[:, index].contiguous()
        super().__init__(
            QuantizedInputs(inputs), linear_with(weight, None if linear.bias is None else linear.bias.data)
        )
        self.flattening = flattening
        self.correction_dampening: float | None = None


class FlattenQuantModifier(Modifier):
    """Puts FlattenLinear in the place of every linear layer but the head.

    rule: which sites get 4 bits; sites: the directory in which `watcher` left what each site can have.
    """

    rule: BitsRule
    sites: Path

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        options = {site: read_options(site_file(self.sites, site[0])) for site in linear_sites(state.model)}
        costs = {site: self._cost(site, found, state.model) for site, found in options.items()}
        gamma = self.rule.threshold(list(costs.values()))
        for site, cost in costs.items():
            flattening = Flattening(options[site], 4 if cost.value < gamma else 8, gamma)
            for name in site:
                linear: Any = state.model.get_submodule(name)
                state.model.set_submodule(name, FlattenLinear(linear, flattening))

    def _cost(self, site: tuple[str, ...], options: SiteOptions, model: nn.Module) -> Cost:
        num_out = sum(model.get_submodule(name).get_parameter("weight").shape[0] for name in site)
        int4, int8 = (num_out * len(options.splits[bits].index) for bits in (4, 8))
        return Cost(criterion_value(options.errors, self.rule.criterion), int4, int8)


class _Halves:
    """Products of a site's inputs with their copies, over two halves of the samples.

    A sample's half is the parity of its number's binary ones, so that kinds of text that come in turn are in both.
    """

    def __init__(self) -> None:
        self.found: dict[int, Products] = {}
        self.num_samples = 0

    def add(self, x: Tensor, copies: Tensor, index: Tensor) -> None:
        """One sample. x: [tokens, C]; copies: [tokens, C']; index: as of Products."""
        half, products = self.num_samples.bit_count() % 2, Products.of(x, copies, index)
        self.found[half] = self.found[half] + products if half in self.found else products
        self.num_samples += 1


def _watch_copies(halves: _Halves) -> Callable[..., None]:
    def hook(expand: QuantizedInputs, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        assert expand.index is not None
        x, copies = (value.detach().flatten(0, -2).float() for value in (arguments[0], output))
        halves.add(x, copies, expand.index)

    return hook


class FlattenedGPTQ(CountingGPTQ):
    """GPTQ of FlattenLinear's `inner` layers.

    correct_inputs: whether 4-bit layers' weights first make up for what their inputs lost (`correction`), before ranges
    are observed. A layer for which a damped Hessian has no factor is rounded to nearest instead, and counted.
    """

    keeps_unseen: bool = True  # a copy that calibration never filled is there for what may come
    correct_inputs: bool = False

    _flattened: dict[nn.Module, FlattenLinear] = PrivateAttr(default_factory=dict)
    _corrected: dict[nn.Module, _Halves] = PrivateAttr(default_factory=dict)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        flattened = {name: module for name, module in state.model.named_modules() if isinstance(module, FlattenLinear)}
        self._flattened = {layer.inner: layer for layer in flattened.values()}
        super().on_calibration_start(state, event, **kwargs)
        for site in input_sites(flattened) if self.correct_inputs else []:
            first = flattened[site[0]]
            if first.flattening.bits != 4 or first.inner in self._restored:
                continue  # 8 bits lose too little to be worth the time
            halves = _Halves()
            self.register_hook(first.expand, _watch_copies(halves), "forward")
            self._corrected |= {flattened[name].inner: halves for name in site}

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        """Corrects the layers that the samples have passed, all of which GPTQ rounds next."""
        for inner in self._num_samples:
            if inner in self._corrected:
                self._correct(inner, self._flattened[inner], self._corrected.pop(inner))
        super().on_sequential_epoch_end(state, event, modules, **kwargs)

    def notes_of(self, layer: nn.Module) -> Notes:
        return {**super().notes_of(layer), "correction_dampening": self._flattened[layer].correction_dampening}

    def take_notes(self, layer: nn.Module, notes: Notes) -> None:
        super().take_notes(layer, notes)
        self._flattened[layer].correction_dampening = notes["correction_dampening"]

    def _correct(self, inner: nn.Module, layer: FlattenLinear, halves: _Halves) -> None:
        if len(halves.found) < 2 or self.dampening_frac is None:
            return
        one, other = halves.found.values()
        repeated = layer.inner.weight.data
        W = repeated[:, copy_numbers(layer.flattening.split.index) == 0]
        try:
            dampening = best_dampening(W, (one, other), [each * self.dampening_frac for each in MULTIPLES])
            if dampening is not None:
                layer.inner.weight.data = repeated + weight_change(W, one + other, dampening)
        except torch.linalg.LinAlgError:
            self.round_only(inner)
            return
        layer.correction_dampening = dampening
