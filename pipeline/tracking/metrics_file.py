"""`metrics.jsonl` in the run directory: one JSON object a line, each with its time, flushed at once."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

METRICS_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends what a run reports to `<run_dir>/metrics.jsonl`.

    Every line has `time` (ISO 8601, UTC) and `event`: start, log, summary, artifact or finish. A line that cannot be
    written is lost, which the first one says.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_NAME
        self._has_warned = False

    def start_run(self, config: dict[str, Any]) -> None:
        """First line: configuration and machine."""
        self._write({"event": "start", "config": config, "system": system_info()})

    def log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        """One line of values at `step`; what is not finite becomes null, which JSON can hold."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write({"event": "log", "stage": stage, "step": step, "metrics": finite})

    def summary(self, stage: str, values: dict[str, Any]) -> None:
        """One line of final values."""
        self._write({"event": "summary", "stage": stage, "summary": values})

    def artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        """One line naming an artifact and what it was made from."""
        line = {"event": "artifact", "stage": stage, "instance": instance, "path": str(path)}
        self._write({**line, "digest": digest, "inputs": inputs})

    def finish(self, status: str) -> None:
        """Last line."""
        self._write({"event": "finish", "status": status})

    def _write(self, fields: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s cannot be written (%s); the run goes on without it", self.path, error)
            self._has_warned = True


def system_info() -> dict[str, Any]:
    """The machine in words: memory in bytes, cores that this process may use."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
