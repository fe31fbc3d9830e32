"""The engines that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.stages.engines import RuntimeEngine, open_engine


@pytest.mark.parametrize("device", ["auto", "cpu", "gpu"])
def test_the_runtime_computes_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str) -> None:
    """What a device comes to is asked with the bytes of the model's files; the rest is the backend's."""
    (tmp_path / "model.safetensors").write_bytes(bytes(77))
    asked: list[Any] = []

    def choose(name: str, weight_bytes: int) -> str:
        asked.append((name, weight_bytes))
        return "cpu" if name == "auto" else name

    def open_backend(name: str, directory: Any, *, threads: int | None) -> Any:
        asked.append((name, directory, threads))

    monkeypatch.setattr("deploy.runtime.devices.choose_backend", choose)
    monkeypatch.setattr("deploy.runtime.backends.open_backend", open_backend)
    monkeypatch.setattr("deploy.formats.model_dir.ModelDirectory.open", lambda path: "directory")
    chat: Any = SimpleNamespace(tokenizer=None, end_ids=frozenset())
    config = {"kind": "runtime", "num_sequences": 3, "device": device}
    engine = open_engine(config, tmp_path, chat, seed=0, threads=2)
    assert isinstance(engine, RuntimeEngine)
    assert asked == [(device, 77), ("cpu" if device == "auto" else device, "directory", 2)]
