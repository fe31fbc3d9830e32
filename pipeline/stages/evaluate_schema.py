"""Structured configs of `conf/evaluate/`."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class EvaluateConfig:
    """How fast the bundle is in each mode, on held-out text.

    num_prompts: held-out conversations whose first turn is answered; none where nothing is generated (eagle=none).
    num_texts: held-out windows of calibrate that are continued, its groups in turn. max_tokens: of an answer.
    repeats: passes over all of them. temperature: at which all answers are given once more, to compare them.
    """

    method: str = "measure"
    num_prompts: int = MISSING
    num_texts: int = MISSING
    max_tokens: int = MISSING
    repeats: int = MISSING
    temperature: float = MISSING


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(group="evaluate", name="evaluate_schema", node=EvaluateConfig)
