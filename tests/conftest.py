"""Shared by all tests: nothing here may reach a network, an account or the user's settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any test module imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on CPU tensors


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test acts for the user who runs it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HF_TOKEN", "HYDRA_FULL_ERROR", "UNDERSTUDY_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes what the user's runs have measured, or what another test has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
