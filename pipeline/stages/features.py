"""Hidden states of the quantized target, from the runtime that serves it, and their comparison with references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.runtime.backend import SEQUENCE_END, Backend, Row
from pipeline.stages.served_form import served_matrix

ROWS_PER_CALL = 512
"""More rows a forward gain no speed and need more memory."""
REFERENCE_TOKENS = 24
"""How many tokens of one conversation the reference recomputes: it is slow, and every bit must agree."""
TORCH_TOKENS = 256
"""How many tokens of each compared conversation torch recomputes."""
TORCH_TOLERANCE = 0.15
"""Largest median relative error of a layer's states against torch in float32, which quantizes activations only where
the file says how. Each run records what it found (`features` in the summary)."""
COARSE_TOLERANCE = 0.5
"""The same where a layer has 4-bit inputs: a value near the middle of two of 15 codes goes to either, by differences in
the last bits (torch's sums, a cache in float32), and what follows differs by as much as the rounding itself does."""

Ids = npt.NDArray[np.int32]
Features = npt.NDArray[np.float32]


class RuntimeFeatures:
    """A train.features.FeatureSource over a backend: several sequences share a forward, and nothing stays cached."""

    def __init__(self, backend: Backend, layers: Sequence[int], *, rows_per_call: int = ROWS_PER_CALL) -> None:
        self._backend, self._layers, self._rows_per_call = backend, tuple(layers), rows_per_call

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer i is what enters decoder layer i; num_layers what enters the final norm."""
        return self._layers

    def capture(self, sequences: Sequence[Ids]) -> list[Features]:
        """Float32 [n, layers, hidden] for every sequence of n ids. Raises ValueError for ids that do not fit."""
        return [features for call in self._calls(sequences) for features in self._forward(call)]

    def _calls(self, sequences: Sequence[Ids]) -> Iterator[list[Ids]]:
        """The sequences in order, as many to a call as fit; one that is too long alone has its own."""
        call: list[Ids] = []
        for ids in sequences:
            if call and sum(map(len, call)) + len(ids) > self._rows_per_call:
                yield call
                call = []
            call.append(ids)
        if call:
            yield call

    def _forward(self, call: Sequence[Ids]) -> Iterator[Features]:
        rows: list[Row] = []
        for sequence, ids in enumerate(call):
            first = len(rows)
            rows += [
                Row(token, position, sequence, SEQUENCE_END if position == 0 else first + position - 1)
                for position, token in enumerate(ids.tolist())
            ]
        try:
            taps = self._backend.forward(rows, self._layers, logit_rows=[]).taps
        finally:
            for sequence in range(len(call)):
                self._backend.reset(sequence)
        stacked = np.stack([taps[layer] for layer in self._layers], axis=1)
        return iter(np.split(stacked, np.cumsum([len(ids) for ids in call])[:-1]))


def compare_features(source: RuntimeFeatures, model_dir: Path, sequences: Sequence[Ids]) -> dict[str, Any]:
    """What the trainer gets against two independent computations of the same weights, on whole conversations.

    The reference of docs/numerics.md computes the beginning of the first one in the runtime's own int8 form, which must
    agree in every bit; torch computes all of them with dequantized weights in float32, and where the file says how
    inputs are quantized with such inputs and the runtime's rows of a tied embedding. Returns figures for the summary:
    number of tokens compared and, by layer, the median over tokens of |runtime − torch| / |torch| (Euclidean).
    Raises RuntimeError naming the layer where either disagrees: nothing may be trained on such states.
    """
    from deploy.formats.model_dir import ModelDirectory
    from deploy.kernels.reference.model import ReferenceBackend
    from train.torch_features import TorchFeatures

    beginning = sequences[0][:REFERENCE_TOKENS]
    cut = [ids[:TORCH_TOKENS] for ids in sequences]
    found = source.capture([beginning, *cut])
    with ModelDirectory.open(model_dir) as files:
        (exact,) = RuntimeFeatures(ReferenceBackend(files), source.layers).capture([beginning])
    for place, layer in enumerate(source.layers):
        if not np.array_equal(found[0][:, place], exact[:, place]):
            raise RuntimeError(f"what enters layer {layer} differs from the reference; the runtime is not usable here")
    model, tolerance = _torch_model(model_dir)
    theirs = np.concatenate(TorchFeatures(model, source.layers).capture(cut))
    error = np.linalg.norm(np.concatenate(found[1:]) - theirs, axis=2) / np.linalg.norm(theirs, axis=2)
    by_layer = {str(layer): float(value) for layer, value in zip(source.layers, np.median(error, axis=0), strict=True)}
    for layer_name, value in by_layer.items():
        if not value <= tolerance:
            raise RuntimeError(
                f"what enters layer {layer_name} differs from torch by {value:.3f} (median, relative), above"
                f" {tolerance}; the runtime is not usable here"
            )
    return {
        "conversations": len(sequences),
        "reference_tokens": len(beginning),
        "reference_equal_bits": True,
        "torch_tokens": len(theirs),
        "torch_relative_error": by_layer,
        "torch_tolerance": tolerance,
    }


def _torch_model(model_dir: Path) -> tuple[Any, float]:
    """The model to compare with, and the tolerance."""
    import torch

    from compress.load import load_float32
    from compress.quantized_inputs import QuantizedInputs

    model: Any = load_float32(model_dir)
    bits = {module.inputs.grid.bits for module in model.modules() if isinstance(module, QuantizedInputs)}
    if bits and model.config.tie_word_embeddings:
        embedding = model.model.embed_tokens.weight.data
        embedding.copy_(torch.from_numpy(served_matrix(embedding.numpy())))
    return model, COARSE_TOLERANCE if 4 in bits else TORCH_TOLERANCE
