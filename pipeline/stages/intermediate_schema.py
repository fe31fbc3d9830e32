"""Structured configs of `conf/intermediate/`: where the model starts, its two phases, its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.stages.eagle_schema import CountsSource, TrainConfig
from pipeline.stages.schema import TextSource


@dataclass
class LayersConfig:
    """`conf/intermediate/initial/layers.yaml`: some layers of a model, with its embedding, head and norms.

    path: a directory, hub id or GGUF file with the target's tokenizer; null: the target itself. layers: which (negative
    ones count from the end), or null; num_layers: how many of the first, or null. Exactly one of the two is given.
    lens_tokens: the head is fitted to read these layers, on so many tokens of what the target said; null: the model's
    own head, which reads the last layers.
    """

    kind: str = "layers"
    path: str | None = None
    revision: str | None = None
    layers: list[int] | None = None
    num_layers: int | None = None
    lens_tokens: int | None = None


@dataclass
class CheckpointConfig:
    """`conf/intermediate/initial/checkpoint.yaml`: a model as it is, e.g. a smaller sibling of the target."""

    kind: str = "checkpoint"
    path: str = MISSING
    revision: str | None = None


class EmbeddingStart(Enum):
    """projected: the target's, on as many of its first singular directions as the model is wide; random: noise."""

    projected = "projected"
    random = "random"


@dataclass
class RandomConfig:
    """`conf/intermediate/initial/random.yaml`: a Llama of these sizes from noise. tied: lm_head is the embedding."""

    kind: str = "random"
    num_layers: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    tied: bool = MISSING
    embedding: EmbeddingStart = MISSING


class Phase(Enum):
    """pretrain: on text; align: on what the target said."""

    pretrain = "pretrain"
    align = "align"


@dataclass
class VocabularyConfig:
    """Tokens that may be drafted, the most frequent ones. size: how many the model is trained with; null: all.

    trim: smaller sizes that are tried on the quantized model; the size with the highest measured MBSU is kept.
    """

    size: int | None = None
    trim: list[int] = MISSING
    counts: CountsSource = MISSING


@dataclass
class PretrainTextConfig:
    """Texts to pre-train on: as of `calibrate.text`, whose held-out documents are not among them."""

    source: TextSource = MISSING
    path: str | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    column: str = "text"


@dataclass
class PretrainConfig:
    """The first phase."""

    text: PretrainTextConfig = field(default_factory=PretrainTextConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class AlignLoss(Enum):
    """tokens: cross-entropy of the target's words; distribution: against the target's distribution for each."""

    tokens = "tokens"
    distribution = "distribution"


@dataclass
class AdapterConfig:
    """Low-rank adapters, merged when they are trained: each product is multiplied by alpha / rank. rank: null trains
    all weights instead."""

    rank: int | None = None
    alpha: int = MISSING


@dataclass
class AlignConfig:
    """The second phase."""

    loss: AlignLoss = MISSING
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class IntermediateConfig:
    """A small language model of the target's tokenizer that drafts for it, or verifies what a head of its own drafts.

    initial: one of the above. phases: which run, in this order; [] takes the model as it is. trains_ends: whether
        embedding and lm_head are trained too.
    num_drafted: tokens that evaluation drafts in a row. heldout_conversations: how many it measures on, at most.
    min_acceptance: export refuses a model whose first drafted token is accepted less often.
    quantize: a config of `conf/quantize/`.
    """

    method: str = "intermediate"
    initial: Any = MISSING
    phases: list[Phase] = MISSING
    trains_ends: bool = MISSING
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    num_drafted: int = MISSING
    heldout_conversations: int = MISSING
    min_acceptance: float = MISSING
    quantize: Any = MISSING


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(group="intermediate", name="intermediate_schema", node=IntermediateConfig)
    starts = {"layers": LayersConfig, "checkpoint": CheckpointConfig, "random": RandomConfig}
    for name, start in starts.items():
        store.store(group="intermediate/initial", name=f"{name}_schema", node=start)
    store.store(group="intermediate/train", name="train_schema", node=TrainConfig)
