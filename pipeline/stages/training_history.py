"""How a training went, for the report: written as it goes, so that nothing of it is lost when the run is killed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.loop.state import Evaluation

POINTS = 200
"""Points of the loss curve at most: what a plot can show."""


class LossLog:
    """A line a step in a file. A step that is trained again after a kill replaces what it said before."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's row of training metrics; rows of evaluations are passed over."""
        if "loss" in metrics:
            line = json.dumps({"step": step, "tokens": int(metrics["tokens"]), "loss": metrics["loss"]})
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def curve(self, last_step: int) -> list[dict[str, float]]:
        """Up to `last_step`, at most `POINTS` points {"tokens", "loss"}: means over as many consecutive rows each."""
        rows: dict[int, dict[str, float]] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a kill, and trained again after it
            rows[row["step"]] = row
        in_order = [rows[step] for step in sorted(rows) if step <= last_step]
        return [
            {"tokens": part[-1]["tokens"], "loss": sum(row["loss"] for row in part) / len(part)}
            for part in _parts(in_order, -(-len(in_order) // POINTS))
        ]


def history(loss: LossLog, evaluations: Sequence[Evaluation], *, with_seconds: bool) -> dict[str, Any]:
    """{"training": the loss curve, "evaluations": [{"step", "tokens", "seconds", "metrics"}]}.

    with_seconds: seconds of training before each evaluation, otherwise null: they are part of the result only where
    time is the budget.
    """
    last_step = evaluations[-1].step  # a run that was killed may have come further than the one that ended
    found = [
        {
            "step": each.step,
            "tokens": each.tokens,
            "seconds": round(each.elapsed_seconds, 1) if with_seconds else None,
            "metrics": each.metrics,
        }
        for each in evaluations
    ]
    return {"training": loss.curve(last_step), "evaluations": found}


def write_history(path: Path, content: Mapping[str, Any]) -> None:
    """history.json."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parts(rows: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), max(size, 1))]
