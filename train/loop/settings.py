"""Settings of a training run, its budget and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "fp32", "bf16")
PREFETCH_BESIDE_GPU = 2
BUDGET = ("max_seconds", "max_tokens", "max_epochs")
SIZES = ("tokens_per_batch", "max_length", "accumulation", "max_skipped_steps", "log_every")
POSITIVE = ("learning_rate", "clip", "checkpoint_every_seconds", *SIZES, *BUDGET)
RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (POSITIVE, lambda value: value > 0, "above 0"),
    (("weight_decay", "feature_cache_gb", "prefetch"), lambda value: value >= 0, "0 or more"),
    (("min_learning_rate_ratio", "warmup_share"), lambda value: 0 <= value <= 1, "between 0 and 1"),
    (("evaluate_every",), lambda value: 0 < value <= 1, "a share of the budget, above 0 and at most 1"),
    (
        ("betas",),
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two, each 0 or more and below 1",
    ),
    (("optimizer",), lambda value: value in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
    (("precision",), lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
)


@dataclass(frozen=True)
class TrainSettings:
    """How a task is trained.

    optimizer: adamw or muon (train/loop/optimizer.py).
    learning_rate: at its peak: linear warm-up over `warmup_share` of the budget, then a cosine down to
        `min_learning_rate_ratio` times the peak.
    weight_decay: on matrices; vectors (norms, biases) are never decayed.
    clip: largest norm of a step's gradient.
    tokens_per_batch: tokens that go through the model at once, on each process.
    max_length: tokens after which a conversation is cut.
    accumulation: batches per optimizer step, over all processes together: so the same training on one process or more.
    precision: fp32, bf16 (autocast; parameters and optimizer stay float32), or auto: bf16 where the machine
        multiplies it natively.
    activation_recomputation: recompute activations in the backward pass instead of keeping them.
    max_seconds, max_tokens, max_epochs: the budget; whichever ends first. Seconds count training only, not evaluation
        or checkpoints. With a time budget, the schedule and so the result depend on the machine's speed.
    evaluate_every: share of the budget between two evaluations; there is always one at the end.
    checkpoint_every_seconds: training seconds between checkpoints; every evaluation writes one too.
    feature_cache_gb: memory for features (2 bytes a value) that later epochs then need not capture.
    prefetch: batches whose features are captured ahead, in the background. None: 2 beside a GPU, and 0 on a CPU, where
        capturing and training at once would only take turns on the same cores.
    max_skipped_steps: steps with a non-finite loss or gradient are skipped; so many in a row end the run.
    log_every: steps averaged in one line of the log.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_share: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5
    tokens_per_batch: int = 2048
    max_length: int = 2048
    accumulation: int = 1
    precision: str = "auto"
    activation_recomputation: bool = False
    max_seconds: float | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    evaluate_every: float = 0.1
    checkpoint_every_seconds: float = 60.0
    feature_cache_gb: float = 0.0
    prefetch: int | None = None
    max_skipped_steps: int = 10
    log_every: int = 10

    def check(self, prefix: str = "") -> None:
        """Raises ValueError for the first setting that makes no sense; `prefix` goes before its name."""
        if all(getattr(self, name) is None for name in BUDGET):
            choices = ", ".join(prefix + name for name in BUDGET)
            raise ValueError(f"training has no budget: set one or more of {choices}")
        for names, is_allowed, rule in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_allowed(value):
                    raise ValueError(f"{prefix}{name}={value} must be {rule}")
        if self.max_length > self.tokens_per_batch:
            raise ValueError(
                f"{prefix}max_length={self.max_length} exceeds {prefix}tokens_per_batch={self.tokens_per_batch}; "
                f"a batch holds whole conversations: lower the one or raise the other"
            )

    def progress(self, *, seconds: float, tokens: int, epochs: float) -> float:
        """Share of the budget that is used up, of whichever part is furthest; at least 1 when training is done."""
        spent = ((seconds, self.max_seconds), (tokens, self.max_tokens), (epochs, self.max_epochs))
        return max(used / limit for used, limit in spent if limit is not None)

    def learning_rate_at(self, progress: float) -> float:
        """The schedule: linear warm-up, then a cosine down to the smallest rate."""
        if progress < self.warmup_share:
            return self.learning_rate * progress / self.warmup_share
        after_warmup = (min(progress, 1.0) - self.warmup_share) / max(1.0 - self.warmup_share, 1e-9)
        cosine = 0.5 * (1.0 + math.cos(math.pi * after_warmup))
        return self.learning_rate * (self.min_learning_rate_ratio + (1.0 - self.min_learning_rate_ratio) * cosine)

    def resolve_prefetch(self, device: torch.device) -> int:
        """Batches whose features are captured ahead of the step that needs them."""
        if self.prefetch is not None:
            return self.prefetch
        return 0 if device.type == "cpu" else PREFETCH_BESIDE_GPU

    def resolve_precision(self, device: torch.device, prefix: str = "") -> str:
        """fp32 or bf16. Raises ValueError for bf16 on a device that would only emulate it, many times slower.

        prefix: goes before the setting's name.
        """
        if self.precision == "fp32":
            return "fp32"
        import torch  # settings are also read where nothing is trained

        if device.type == "cuda":
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if self.precision == "bf16" and not is_native:
            raise ValueError(
                f"{prefix}precision=bf16: this {device.type} does not multiply bfloat16 natively; use auto or fp32"
            )
        return "bf16" if is_native else "fp32"
