"""How a run is recorded: `metrics.jsonl` always, Weights & Biases when configured.

Stages see `Tracker` only. Nothing here imports wandb until a W&B run starts.
"""

from pipeline.tracking.base import Tracker, Trackers
from pipeline.tracking.make import make_tracker
from pipeline.tracking.metrics_file import MetricsFile

__all__ = ["MetricsFile", "Tracker", "Trackers", "make_tracker"]
