"""Shared by all tests: nothing here may reach a network, an account or the user's settings."""

from __future__ import annotations

import os

import pytest

# Before any test module imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test acts for the user who runs it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HF_TOKEN", "HYDRA_FULL_ERROR", "UNDERSTUDY_DEBUG"):
        monkeypatch.delenv(name, raising=False)
