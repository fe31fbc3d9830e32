"""Training inside a stage: the loop with progress, metrics to the tracker, and a record of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages.training_history import LossLog

if TYPE_CHECKING:
    from train.features import FeatureSource
    from train.loop.batches import TokenSequence
    from train.loop.settings import TrainSettings
    from train.loop.state import TrainResult
    from train.loop.task import Task

CHECKPOINTS = "checkpoints"
LOSS = "loss.jsonl"
UNKEYED = ("checkpoint_every_seconds", "feature_cache_gb", "max_skipped_steps", "prefetch")
"""Settings that change nothing in the result of a training that ends."""
PERCENT = 100


def keyed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a training's settings that enters a digest."""
    return {key: value for key, value in config.items() if key not in UNKEYED}


def unkeyed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part that does not."""
    return {key: config[key] for key in UNKEYED}


def train_settings(config: dict[str, Any]) -> TrainSettings:
    """A configuration's training settings as the loop has them."""
    from train.loop.settings import TrainSettings

    return TrainSettings(**{**config, "betas": tuple(config["betas"])})


def check_training(config: dict[str, Any], prefix: str) -> None:
    """Raises ValueError for training settings that make no sense, or that this machine cannot follow.

    prefix: goes before a setting's name.
    """
    settings = train_settings(config)
    settings.check(prefix)
    if settings.precision == "bf16":
        import torch

        settings.resolve_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"), prefix)


def run_training(
    context: BuildContext,
    task: Task,
    sequences: Sequence[TokenSequence],
    settings: TrainSettings,
    what: str,
    *,
    features: FeatureSource | None = None,
    phase: str = "",
    is_start_trained: bool = False,
) -> tuple[TrainResult, LossLog]:
    """Trains into `context.out`, going on from the checkpoints of an interrupted build.

    what: shown beside the progress. phase: where a stage trains more than once; metrics are then called `phase/…`.
    is_start_trained: see `train.loop.loop.train`.
    """
    from train.loop.loop import train

    loss = LossLog(context.scratch / f"{phase}{LOSS}")

    def on_log(step: int, metrics: dict[str, float]) -> None:
        loss.add(step, metrics)
        prefix = f"{phase}/" if phase else ""
        context.tracker.log(context.stage, {f"{prefix}{name}": value for name, value in metrics.items()}, step)

    with context.progress(PERCENT, what, "%") as bar:
        shown = 0

        def on_progress(share: float, _seconds_left: float) -> None:
            nonlocal shown
            reached = int(share * PERCENT)
            bar.update(reached - shown)
            shown = reached

        result = train(
            task,
            sequences,
            settings,
            context.scratch / CHECKPOINTS / phase,
            seed=context.seed,
            features=features,
            on_log=on_log,
            on_progress=on_progress,
            is_start_trained=is_start_trained,
        )
    return result, loss
