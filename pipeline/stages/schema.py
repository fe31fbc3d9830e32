"""Structured configs of the stages; each file in `conf/<group>/` starts from one of them.

Where a method has keys of its own it has a schema of its own, so that a key which a method would ignore is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.stages.quantize_schema import METHODS


class TargetKind(Enum):
    """package: a pip package with a GGUF file; gguf: a GGUF file; hf: a local directory or a hub id."""

    package = "package"
    gguf = "gguf"
    hf = "hf"


@dataclass
class TargetConfig:
    """`conf/target/`: the model whose words are kept.

    name: of the bundle. path: file, directory or hub id. licence: of the bundle; null takes what the source says.
    """

    name: str = MISSING
    kind: TargetKind = MISSING
    path: str | None = None
    package: str | None = None
    revision: str | None = None
    licence: str | None = None


@dataclass
class ChatConfig:
    """Conversations that the target writes itself. Lengths in tokens; shares between 0 and 1."""

    num_samples: int = MISSING
    num_heldout: int = MISSING
    prompt_tokens: int = MISSING
    response_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    system_share: float = MISSING
    drop_share: float = MISSING


@dataclass
class FreeConfig:
    """Texts that the target writes after one random token. Lengths in tokens."""

    num_samples: int = MISSING
    num_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    drop_share: float = MISSING


class TextSource(Enum):
    """python: Python's own prose and code; file: `path`; dataset: `dataset`, by the datasets library."""

    python = "python"
    file = "file"
    dataset = "dataset"


@dataclass
class TextConfig:
    """Texts that exist. num_samples and num_heldout count windows per group (prose and code are two groups)."""

    source: TextSource = MISSING
    path: str | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    column: str = "text"
    num_samples: int = MISSING
    num_heldout: int = MISSING
    heldout_share: float = MISSING


@dataclass
class CalibrateConfig:
    """`conf/calibrate/`. sequence_length: tokens in a window of text."""

    sequence_length: int = MISSING
    chat: ChatConfig = field(default_factory=ChatConfig)
    free: FreeConfig = field(default_factory=FreeConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass
class QualityConfig:
    """`conf/quality/`. variants: name → a quantize config to compare with; peers that do not apply are left out."""

    variants: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(group="target", name="target_schema", node=TargetConfig)
    store.store(group="calibrate", name="calibrate_schema", node=CalibrateConfig)
    store.store(group="quality", name="quality_schema", node=QualityConfig)
    for name, node in METHODS.items():
        store.store(group="quantize", name=f"{name}_schema", node=node)
