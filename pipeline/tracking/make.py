"""The tracker that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from pipeline.schema import TrackingConfig, TrackingMode
from pipeline.tracking.base import Tracker, Trackers
from pipeline.tracking.metrics_file import MetricsFile
from pipeline.tracking.wandb_run import WandbRun


def make_tracker(config: TrackingConfig, run_dir: Path) -> Tracker:
    """`metrics.jsonl` in `run_dir`, and a W&B run when `config.mode` asks for one."""
    members: list[Tracker] = [MetricsFile(run_dir)]
    if config.mode is not TrackingMode.none:
        members.append(WandbRun(config, run_dir))
    return Trackers(members)
