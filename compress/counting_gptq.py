"""GPTQ by llmcompressor, counted and resumable."""

from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import PrivateAttr
from torch import Tensor, nn

from compress.errors import SettingError
from compress.finished_blocks import Notes, restore_blocks, write_block
from compress.recipes import report_fallen_back, report_layers

RARE = 1e-6
"""Diagonal, as a share of the Hessian's mean, that an input gets which calibration never saw but that may occur."""


class CountingGPTQ(GPTQModifier):
    """llmcompressor's GPTQ, with a record of the layers that fell back to rounding, and going on where it stopped.

    keeps_unseen: weights of inputs that were always 0 are rounded to nearest; the library would make them 0.
    stops_at_fallback: the first layer that would fall back raises SettingError instead, before the others are computed.
    finished: a directory for the blocks that are done (`finished_blocks`); those it has are not computed again, and
    everything behind them comes out as it would have, in every bit. None keeps nothing.
    """

    keeps_unseen: bool = False
    stops_at_fallback: bool = False
    finished: Path | None = None

    _restored: set[nn.Module] = PrivateAttr(default_factory=set)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        if self.finished is None:
            return
        self.finished.mkdir(parents=True, exist_ok=True)
        layers: dict[str, Any] = {name: module for module, name in self._module_names.items()}
        for name, notes in restore_blocks(self.finished, layers).items():
            self._restored.add(layers[name])
            self.take_notes(layers[name], notes)
            report_layers(1)

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        modules = [module for module in modules if module not in self._restored]
        super().on_sequential_epoch_end(state, event, modules, **kwargs)
        done: dict[str, Any] = {self._module_names[m]: m for m in modules if m in self._module_names}
        if self.finished is not None and done:
            write_block(self.finished, done, {name: self.notes_of(module) for name, module in done.items()})

    def calibrate_module(self, module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        if module not in self._restored:
            super().calibrate_module(module, args, _output)

    def notes_of(self, layer: nn.Module) -> Notes:
        """What is to be known of a finished layer besides its weight."""
        return {"fell_back": self._module_names[layer] in self._rtn_fallback_module_names}

    def take_notes(self, layer: nn.Module, notes: Notes) -> None:
        """Notes of a layer that an earlier run finished."""
        self._num_compressed_modules += 1
        if notes["fell_back"]:
            self._rtn_fallback_module_names.append(self._module_names[layer])

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        fallen_back = set(self._rtn_fallback_module_names)
        report_fallen_back([name for name in self._module_names.values() if name in fallen_back])
        return super().on_finalize(state, **kwargs)

    def compress_module_list(self, module_list: list[nn.Module]) -> None:
        for module in module_list:
            observer: Any = module.weight_observer
            if self.keeps_unseen:
                diagonal = self._hessians[module].diagonal()
                diagonal[diagonal == 0] = RARE * diagonal.mean()
            num_samples = self._num_samples[module].clone()
            statistics = observer.get_statistics()  # which the observer deletes when it gives its parameters
            try:
                super().compress_module_list([module])
            except torch.linalg.LinAlgError:
                # The library falls back when H has no factor, but not when only its inverse has none.
                self.round_only(module)
                self._num_samples[module] = num_samples
                for name, value in statistics.items():
                    setattr(observer, name, value)
                super().compress_module_list([module])
            if self.stops_at_fallback and self._rtn_fallback_module_names:
                raise SettingError(
                    f"on_singular=error: {self._rtn_fallback_module_names[0]} has a singular Hessian; calibrate on more"
                    " samples, raise dampening, or choose on_singular=rtn"
                )
            report_layers(1)

    def round_only(self, module: nn.Module) -> None:
        """Counts a layer as fallen back and gives it the Hessian under which GPTQ rounds to nearest.

        Under an identity nothing is passed on from column to column.
        """
        self._hessians[module] = torch.eye(module.get_parameter("weight").shape[1])
        self._rtn_fallback_module_names.append(self._module_names[module])
