"""A modifier of llmcompressor that changes nothing: it watches inputs and writes what each site can have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import Tensor, nn

from compress.flattenquant.choice import site_options
from compress.flattenquant.search import Seen
from compress.flattenquant.site_files import site_file, write_options
from compress.flattenquant.splits import FlattenRule
from compress.grids import WeightGrid
from compress.recipes import report_layers, rounded
from compress.sites import input_sites

ROWS_PER_SITE = 256
"""Inputs on which a site's errors are measured, the same number from every sample, none of them a sample's first."""


class SiteWatcher(Modifier):
    """Measures every site with 4 bits and with 8 (`choice.site_options`) and writes one file for each.

    num_samples: of the calibration; directory: where the files go. A site whose file is there is not measured again.
    """

    requires_calibration_data: bool = True
    rule: FlattenRule
    num_samples: int
    directory: Path

    _sites: list[tuple[str, ...]] = PrivateAttr(default_factory=list)
    _inputs: dict[str, "_Inputs"] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._sites = linear_sites(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for site in self._sites:
            if site_file(self.directory, site[0]).exists():
                report_layers(len(site))
                continue
            self._inputs[site[0]] = _Inputs()
            self.register_hook(state.model.get_submodule(site[0]), self._watch(site[0]), "forward")

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        """Measures the sites that the samples have passed, so that their rows need not be kept."""
        for first, *others in self._sites:
            inputs = self._inputs.get(first)
            if inputs is None or not inputs.samples:
                continue
            if not all(torch.isfinite(sample.channel_max).all() for sample in inputs.samples):
                raise ValueError(f"{first}: its inputs are not finite; the model's weights are not usable")
            linears: list[Any] = [state.model.get_submodule(name) for name in (first, *others)]
            layers = [(linear.weight.data, None if linear.bias is None else linear.bias.data) for linear in linears]
            options = site_options(inputs.halves(), layers, self.rule, self._round)
            write_options(site_file(self.directory, first), options)
            report_layers(len(linears))
            del self._inputs[first]

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def _round(self, weight: Tensor, inputs: Tensor, bits: int) -> Tensor:
        grid = WeightGrid(bits, self.rule.group_size, self.rule.symmetric)
        return rounded(weight, inputs, grid, self.rule.observer)

    def _watch(self, name: str) -> Callable[..., None]:
        rows_per_sample = -(-ROWS_PER_SITE // self.num_samples)

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
            self._inputs[name].add(arguments[0].detach().flatten(0, -2), rows_per_sample)

        return hook


def linear_sites(model: nn.Module) -> list[tuple[str, ...]]:
    """The module names of every linear layer but the head, those that read one input together."""
    return input_sites(
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("model.layers.")
    )


class _Inputs:
    """What each sample showed of a site's inputs: the largest value of each channel, and some rows."""

    def __init__(self) -> None:
        self.samples: list[Seen] = []

    def add(self, x: Tensor, num_rows: int) -> None:
        """x: a sample's inputs [tokens, C], of which `num_rows` are kept, evenly spread.

        The first token's, which is like no other, is not kept where there is another.
        """
        later = x[1:] if len(x) > 1 else x
        num_kept = min(num_rows, len(later))
        places = (2 * torch.arange(num_kept) + 1) * len(later) // (2 * num_kept)
        self.samples.append(Seen(x.abs().amax(0), later[places].clone()))

    def halves(self) -> list[Seen]:
        """Of samples drawn at random, for they come by kind; one where there is one sample."""
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(0)).tolist()
        middle = (len(order) + 1) // 2
        parts = [sorted(order[:middle]), sorted(order[middle:])]
        return [Seen.together([self.samples[i] for i in part]) for part in parts if part]
