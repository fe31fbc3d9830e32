"""The engines that a configuration describes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.runtime.devices import DeviceError
from pipeline.stages.engines import RuntimeEngine, open_engine


def opened(directory: Path, device: str, *, is_on_gpu: bool) -> Any:
    chat: Any = SimpleNamespace(tokenizer=None, end_ids=frozenset())
    config = {"kind": "runtime", "num_sequences": 3, "device": device}
    return open_engine(config, directory, chat, seed=0, threads=2, is_on_gpu=is_on_gpu)


@pytest.mark.parametrize(("device", "is_on_gpu"), [("auto", False), ("auto", True), ("cpu", False), ("gpu", True)])
def test_the_runtime_computes_where_the_key_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, is_on_gpu: bool
) -> None:
    """A GPU is asked for with the bytes of the model's files; the files are closed when the backend has read them."""
    (tmp_path / "model.safetensors").write_bytes(bytes(77))
    told: list[Any] = []

    @contextmanager
    def open_directory(path: Path) -> Any:
        yield path
        told.append("closed")

    def choose(name: str, weight_bytes: int) -> str:
        told.append((name, weight_bytes))
        return name

    def open_backend(name: str, directory: Any, *, threads: int | None) -> Any:
        told.append((name, directory, threads))

    monkeypatch.setattr("deploy.runtime.devices.choose_backend", choose)
    monkeypatch.setattr("deploy.runtime.backends.open_backend", open_backend)
    monkeypatch.setattr("deploy.formats.model_dir.ModelDirectory.open", open_directory)
    assert isinstance(opened(tmp_path, device, is_on_gpu=is_on_gpu), RuntimeEngine)
    on_gpu, on_cpu = [("gpu", 77), ("gpu", tmp_path, 2), "closed"], [("cpu", tmp_path, 2), "closed"]
    assert told == (on_gpu if is_on_gpu else on_cpu)


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_a_gpu_that_the_key_names_and_that_is_gone_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    def choose(name: str, weight_bytes: int) -> str:
        raise DeviceError("the models need 9.0 GiB")

    monkeypatch.setattr("deploy.runtime.devices.choose_backend", choose)
    expected = (
        rf"^generate\.engine\.device={device}: the data set's key says that a GPU .* \(the models need 9\.0 GiB\);"
    )
    with pytest.raises(ValueError, match=expected):
        opened(tmp_path, device, is_on_gpu=True)
