"""Weights & Biases as a `Tracker` that cannot hurt a run.

All calls to wandb happen in one daemon thread, in order; the run only puts them in a queue. The first failure
(not installed, no account, no network, anything raised) or a wait beyond `timeout_seconds` is logged once as a
warning, and from then on the run goes on without W&B.

Lineage: every artifact is logged by reference to its directory, under its instance's name with its digest as
alias, and its inputs are marked as used. Offline, W&B cannot mark inputs; they stand in the artifact's metadata
in both modes. File contents are uploaded only when `log_files` is set.
"""

from __future__ import annotations

import logging
import queue
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.schema import TrackingConfig, TrackingMode
from pipeline.tracking.metrics_file import system_info

logger = logging.getLogger(__name__)

Call = Callable[[], None]


class WandbRun:
    """One W&B run, fed from a queue. `start_run` returns at once; `finish` waits at most the timeout."""

    def __init__(self, config: TrackingConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._run: Any = None
        self._stages_seen: set[str] = set()
        self._logged: dict[str, Any] = {}

    def start_run(self, config: dict[str, Any]) -> None:
        """Start the W&B run with this configuration and the machine's description."""
        self._thread.start()
        self._calls.put(lambda: self._start(config))

    def log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        """Values as `<stage>/<name>` over `<stage>/step`."""
        self._put(lambda: self._log(stage, dict(metrics), step))

    def summary(self, stage: str, values: dict[str, Any]) -> None:
        """Values as `<stage>/<name>` in the run's summary."""
        flat = {f"{stage}/{name}": value for name, value in values.items()}
        self._put(lambda: self._run.summary.update(flat))

    def artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        """Log the artifact and mark its inputs as used."""
        self._put(lambda: self._artifact(stage, instance, path, digest, dict(inputs)))

    def finish(self, status: str) -> None:
        """End the W&B run; waits at most twice the timeout (a slow start, then a slow end)."""
        self._put(lambda: self._finish(status))
        self._calls.put(None)
        self._thread.join(2 * self._config.timeout_seconds)
        if self._thread.is_alive():
            self._give_up(f"no answer within tracking.timeout_seconds={self._config.timeout_seconds:g}")

    def _put(self, call: Call) -> None:
        if not self._failed.is_set():
            self._calls.put(call)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failed.is_set():
                continue
            try:
                call()
            except BaseException as error:  # wandb may even call sys.exit; nothing of it may reach the run
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, problem: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            logger.warning("W&B tracking is off for the rest of this run (%s); metrics.jsonl goes on", problem)

    def _start(self, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            init_timeout=self._config.timeout_seconds,
            finish_timeout=self._config.timeout_seconds,
            console="off",
            silent=True,
        )
        is_online = self._config.mode is TrackingMode.online
        if is_online and not wandb.login(prompt=False):
            raise RuntimeError("no account: run `wandb login`, set WANDB_API_KEY or use tracking=offline")
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.run_name,
            tags=list(self._config.tags),
            dir=str(self._run_dir),
            config={**config, "system": system_info()},
            mode="online" if is_online else "offline",
            settings=settings,
        )

    def _log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        if stage not in self._stages_seen:
            self._stages_seen.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step})

    def _artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        wandb = sys.modules["wandb"]
        if self._config.mode is TrackingMode.online:
            for used in inputs.values():
                self._run.use_artifact(self._logged[used].wait())
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", instance).strip("-")
        made = wandb.Artifact(name, type=stage, metadata={"instance": instance, "digest": digest, "inputs": inputs})
        if self._config.log_files:
            made.add_dir(str(path))
        else:
            made.add_reference(path.as_uri(), checksum=False)
        self._logged[digest] = self._run.log_artifact(made, aliases=["latest", digest])

    def _finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)
