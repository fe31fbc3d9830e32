"""Hidden states from a transformers model, on any device: the FeatureSource where our own runtime does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Ids = npt.NDArray[np.int32]
Features = npt.NDArray[np.float32]

ROWS_PER_CALL = 4096


class TorchFeatures:
    """What enters chosen layers of a decoder-only transformers model, for whole sequences.

    The states are taken where layers begin rather than from `output_hidden_states`, whose last entry has been through
    the final norm already. Sequences are padded on the right: under causal attention no token sees what follows it.

    model: a causal LM with `.model.layers` and `.model.norm` (the architectures of deploy.formats), on its device and
    in its dtype. layers: as FeatureSource has it. rows_per_call: padded tokens computed together.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], *, rows_per_call: int = ROWS_PER_CALL) -> None:
        decoder: Any = model.model
        self._decoder = decoder
        self._layers, self._rows_per_call = tuple(layers), rows_per_call
        num_layers = len(decoder.layers)
        for layer in layers:
            if not 0 <= layer <= num_layers:
                raise ValueError(f"feature layers {list(layers)}: layer {layer} is not in 0…{num_layers}")

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer i is what enters decoder layer i; num_layers what enters the final norm."""
        return self._layers

    def capture(self, sequences: Sequence[Ids]) -> list[Features]:
        """Float32 [n, layers, hidden] for every sequence of n ids."""
        return [features for call in self._calls(sequences) for features in self._forward(call)]

    def _calls(self, sequences: Sequence[Ids]) -> Iterator[list[Ids]]:
        """The sequences in order, as many to a call as fit with their padding."""
        call: list[Ids] = []
        for ids in sequences:
            longest = max(len(ids), *map(len, call)) if call else len(ids)
            if call and longest * (len(call) + 1) > self._rows_per_call:
                yield call
                call = []
            call.append(ids)
        if call:
            yield call

    @torch.inference_mode()
    def _forward(self, call: Sequence[Ids]) -> list[Features]:
        longest = max(map(len, call))
        padded = torch.zeros((len(call), longest), dtype=torch.int64)
        for row, ids in zip(padded, call, strict=True):
            row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        entered: dict[int, Tensor] = {}
        modules = [*self._decoder.layers, self._decoder.norm]
        hooks = [
            modules[layer].register_forward_pre_hook(_keep_input(entered, layer), with_kwargs=True)
            for layer in set(self._layers)
        ]
        try:
            self._decoder(padded.to(next(self._decoder.parameters()).device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        stacked = torch.stack([entered[layer] for layer in self._layers], dim=2).float().cpu().numpy()
        return [features[: len(ids)].copy() for features, ids in zip(stacked, call, strict=True)]


def _keep_input(entered: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entered[layer] = arguments[0] if arguments else keywords["hidden_states"]

    return hook
