"""Structured configs of `conf/generate/`: prompts, sampling, and one schema for each engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Writer(Enum):
    """Whose words are learnt: the quantized model's, as it is served, or the plain target's (to compare)."""

    quantized = "quantized"
    target = "target"


@dataclass
class SelfWrittenConfig:
    """User turns that the target writes itself. max_tokens: one that has not ended by then is dropped.

    first_words: that conversations begin with, one of them drawn for each; an empty one leaves them to the target, and
    so does an empty list.
    """

    max_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    first_words: list[str] = MISSING


@dataclass
class PromptsConfig:
    """Prompts that exist: `path` (a .jsonl file) or `dataset` (by the datasets library; `column` holds texts or turns).

    share: of the conversations that begin with one of them; 0 uses none, 1 uses nothing else.
    """

    share: float = MISSING
    path: str | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    column: str = "prompt"


@dataclass
class RuntimeEngineConfig:
    """`conf/generate/engine/runtime.yaml`. num_sequences: by one forward; changes no byte of the result.

    device: auto, cpu or gpu.
    """

    kind: str = "runtime"
    num_sequences: int = MISSING
    device: str = MISSING


@dataclass
class TransformersEngineConfig:
    """`conf/generate/engine/transformers.yaml`. device: auto, cpu, cuda, cuda:1, …"""

    kind: str = "transformers"
    device: str = MISSING
    batch_size: int = MISSING


@dataclass
class ServerEngineConfig:
    """`conf/generate/engine/server.yaml`: see `train.data.engines.server_engine.ServerSettings`."""

    kind: str = "server"
    url: str = MISSING
    model: str = MISSING
    concurrency: int = MISSING
    max_retries: int = MISSING
    retry_seconds: float = MISSING
    timeout_seconds: float = MISSING
    api_key_variable: str | None = None


@dataclass
class GenerateConfig:
    """`conf/generate/`: conversations to learn from.

    num_tokens: that the target writes in all. num_heldout: conversations, of which `heldout_greedy_share` are greedy.
    max_tokens: of one response. stop_loops: whether one that goes round in circles ends there. num_turns: user turns,
    where a conversation can be continued. shard_size: conversations begun in one file.

    A killed run keeps whole shards and loses those under way. `transformers` has one at a time. `runtime` and `server`
    begin another while no more than num_sequences (concurrency) conversations are under way: at first that number /
    shard_size + 1 of them, and more where long conversations hold earlier shards open.
    """

    writer: Writer = MISSING
    num_tokens: int = MISSING
    num_heldout: int = MISSING
    heldout_greedy_share: float = MISSING
    temperatures: list[float] = MISSING
    top_p: float = MISSING
    max_tokens: int = MISSING
    stop_loops: bool = MISSING
    num_turns: int = MISSING
    shard_size: int = MISSING
    self_written: SelfWrittenConfig = field(default_factory=SelfWrittenConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    engine: Any = MISSING


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(group="generate", name="generate_schema", node=GenerateConfig)
    engines = {"runtime": RuntimeEngineConfig, "transformers": TransformersEngineConfig, "server": ServerEngineConfig}
    for name, node in engines.items():
        store.store(group="generate/engine", name=f"{name}_schema", node=node)
