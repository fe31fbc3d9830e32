"""The interface through which a run is recorded, and several recorders as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Records one run. None of the calls may fail the run that makes them."""

    def start_run(self, config: dict[str, Any]) -> None:
        """The run begins with this resolved configuration."""

    def log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        """Values of a running stage at `step`, which grows within the stage."""

    def summary(self, stage: str, values: dict[str, Any]) -> None:
        """Final values of a stage, whether built or reused."""

    def artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        """A stage's artifact; inputs: role → digest of the artifact that was read."""

    def finish(self, status: str) -> None:
        """The run ends: `finished` or `failed`."""


class Trackers:
    """Passes every call to each of several trackers, in order."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self._members = tuple(members)

    def start_run(self, config: dict[str, Any]) -> None:
        """The run begins with this resolved configuration."""
        for member in self._members:
            member.start_run(config)

    def log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        """Values of a running stage at `step`."""
        for member in self._members:
            member.log(stage, metrics, step)

    def summary(self, stage: str, values: dict[str, Any]) -> None:
        """Final values of a stage."""
        for member in self._members:
            member.summary(stage, values)

    def artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        """A stage's artifact."""
        for member in self._members:
            member.artifact(stage, instance, path, digest, inputs)

    def finish(self, status: str) -> None:
        """The run ends."""
        for member in self._members:
            member.finish(status)
