"""Structured configs of `conf/eagle/` and of everything that is trained by the one loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Precision(Enum):
    """Of products in training; auto: bf16 where the machine multiplies it natively."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class OptimizerKind(Enum):
    """adamw; muon: Muon for matrices between layers, AdamW for the rest."""

    adamw = "adamw"
    muon = "muon"


@dataclass
class TrainConfig:
    """The training loop: train.loop.settings.TrainSettings explains every key. A budget is one of max_seconds,
    max_tokens and max_epochs or several, of which the first that is reached ends the training."""

    optimizer: OptimizerKind = MISSING
    learning_rate: float = MISSING
    min_learning_rate_ratio: float = MISSING
    warmup_share: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    clip: float = MISSING
    tokens_per_batch: int = MISSING
    max_length: int = MISSING
    accumulation: int = MISSING
    precision: Precision = MISSING
    activation_recomputation: bool = MISSING
    max_seconds: float | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    evaluate_every: float = MISSING
    checkpoint_every_seconds: float = MISSING
    feature_cache_gb: float = MISSING
    prefetch: int | None = MISSING
    max_skipped_steps: int = MISSING
    log_every: int = MISSING


class CountsSource(Enum):
    """What the draft vocabulary's tokens are counted in: the training conversations' responses, or raw text (Python's
    own prose and code)."""

    generated = "generated"
    text = "text"


@dataclass
class DraftVocabularyConfig:
    """The drafter's own vocabulary: the most frequent tokens of the target's.

    size: how many the head is trained with. trim: smaller sizes that are tried on the trained head (VocabTrim needs no
    training); the size with the highest measured MBSU is kept.
    """

    size: int = MISSING
    trim: list[int] = MISSING
    counts: CountsSource = MISSING


class EmbeddingForm(Enum):
    """reference: the file leaves the target's embedding out; copy: it holds it, for programs that need it."""

    reference = "reference"
    copy = "copy"


@dataclass
class EagleHeadConfig:
    """A head that drafts for the target from its hidden states.

    feature_layers: i is what enters decoder layer i, negative ones count from what enters the final norm (-1); null:
        2, half of them and the third from the end, as in EAGLE-3.
    initial: directory of a head for the same model, a bundle's `eagle-target/` for one, whose training goes on; null:
        the head starts from the model's own last step.
    unrolls: steps of the training-time test; step_decay: weight of each step's loss relative to the one before.
    num_drafted: tokens that evaluation drafts in a row. heldout_conversations: how many it measures on, at most.
    compared_conversations: how many are recomputed with the reference and with torch before training.
    min_acceptance: export refuses a head whose first drafted token is accepted less often.
    """

    method: str = "eagle"
    initial: str | None = None
    feature_layers: list[int] | None = None
    norm_before_residual: bool = MISSING
    vocabulary: DraftVocabularyConfig = field(default_factory=DraftVocabularyConfig)
    unrolls: int = MISSING
    step_decay: float = MISSING
    num_drafted: int = MISSING
    heldout_conversations: int = MISSING
    compared_conversations: int = MISSING
    embedding: EmbeddingForm = MISSING
    min_acceptance: float = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(group="eagle", name="head_schema", node=EagleHeadConfig)
