"""Features as the trainer gets them: those of each conversation alone, from the runtime that serves the target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.safetensors_file import write_safetensors
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Forward
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.stages.features import RuntimeFeatures, compare_features
from tests.tiny_llama import TINY_LLAMA

CONFIG = {**TINY_LLAMA, "num_hidden_layers": 3}
LAYERS = (0, 1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (0.1 * rng.standard_normal(size) + name.endswith("norm.weight")).astype(np.float32)
        for name, size in sizes.items()
    }
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def sequences(*lengths: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 97, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("rows_per_call", [1, 20, 512])
def test_a_conversations_features_are_its_own_whatever_shares_the_call(model: Path, rows_per_call: int) -> None:
    several = sequences(7, 19, 1, 33)
    backend = CpuBackend(model, threads=1)
    found = RuntimeFeatures(backend, LAYERS, rows_per_call=rows_per_call).capture(several)
    reference = RuntimeFeatures(ReferenceBackend(model), LAYERS)
    for ids, features in zip(several, found, strict=True):
        (alone,) = reference.capture([ids])
        assert features.shape == (len(ids), 3, 64)
        assert features.dtype == np.float32
        assert np.array_equal(features, alone)


def test_nothing_stays_cached_and_layers_keep_their_order(model: Path) -> None:
    backend = CpuBackend(model, threads=1)
    (ids,) = sequences(9)
    (turned,) = RuntimeFeatures(backend, LAYERS[::-1]).capture([ids])
    (found,) = RuntimeFeatures(backend, LAYERS).capture([ids])
    assert np.array_equal(turned[:, ::-1], found)
    assert backend.length(0) == 0


def test_a_token_that_does_not_fit_leaves_the_source_usable(model: Path) -> None:
    source = RuntimeFeatures(CpuBackend(model, threads=1), LAYERS)
    good, bad = sequences(5)[0], np.array([3, 97], dtype=np.int32)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        source.capture([good, bad])
    assert len(source.capture([good])[0]) == 5


def test_the_comparison_reports_its_figures(model: Path) -> None:
    figures = compare_features(RuntimeFeatures(CpuBackend(model, threads=1), LAYERS), model, sequences(40, 13))
    assert figures["reference_equal_bits"]
    assert (figures["conversations"], figures["reference_tokens"], figures["torch_tokens"]) == (2, 24, 53)
    assert set(figures["torch_relative_error"]) == {"0", "1", "3"}
    assert all(0 < error < 0.15 for error in figures["torch_relative_error"].values())


class Altered:
    """A backend whose states at one layer are another's: what a wrong kernel or a wrong layer would give."""

    def __init__(self, backend: CpuBackend, layer: int, factor: float) -> None:
        self._backend, self._layer, self._factor = backend, layer, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *arguments: Any, **keywords: Any) -> Forward:
        result = self._backend.forward(*arguments, **keywords)
        changed = (result.taps[self._layer] * np.float32(self._factor)).astype(np.float32)
        return replace(result, taps={**result.taps, self._layer: changed})


def test_one_wrong_bit_is_found(model: Path) -> None:
    altered: Any = Altered(CpuBackend(model, threads=1), 1, 1 + 2e-7)
    with pytest.raises(RuntimeError, match="what enters layer 1 differs from the reference"):
        compare_features(RuntimeFeatures(altered, LAYERS), model, sequences(30))


def test_states_of_other_weights_than_torchs_are_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.load

    original = compress.load.load_float32

    def doubled(directory: Path) -> Any:
        loaded = original(directory)
        loaded.model.layers[1].mlp.down_proj.weight.data.mul_(4)
        return loaded

    monkeypatch.setattr(compress.load, "load_float32", doubled)
    source = RuntimeFeatures(CpuBackend(model, threads=1), LAYERS)
    with pytest.raises(RuntimeError, match=r"what enters layer 3 differs from torch by 0\.\d+"):
        compare_features(source, model, sequences(30))
