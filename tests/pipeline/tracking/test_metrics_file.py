"""metrics.jsonl."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.tracking import MetricsFile, Trackers


def test_every_call_is_one_timed_json_line(tmp_path: Path) -> None:
    tracker = Trackers([MetricsFile(tmp_path)])
    tracker.start_run({"seed": 0})
    tracker.log("train", {"loss": np.float32(1.5), "bad": float("nan")}, 3)
    tracker.summary("train", {"perplexity": 18.0})
    tracker.artifact("train", "train[a]", tmp_path / "x", "abc", {"target": "def"})
    tracker.finish("finished")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "log", "summary", "artifact", "finish"]
    assert all("time" in line for line in lines)
    assert lines[0]["system"]["memory_bytes"] > 0
    assert lines[1]["metrics"] == {"loss": 1.5, "bad": None}
    assert lines[3]["inputs"] == {"target": "def"}


def test_a_second_tracker_gets_the_same_calls(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Trackers([MetricsFile(tmp_path / "a"), MetricsFile(tmp_path / "b")]).finish("failed")
    assert [json.loads((tmp_path / name / "metrics.jsonl").read_text())["status"] for name in ("a", "b")] == [
        "failed",
        "failed",
    ]


def test_a_directory_that_goes_away_costs_the_lines_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = MetricsFile(run_dir)
    metrics.finish("finished")
    shutil.rmtree(run_dir)
    with caplog.at_level(logging.WARNING):
        metrics.log("train", {"loss": 1.0}, 1)
        metrics.log("train", {"loss": 1.0}, 2)
    assert [record.getMessage().count("the run goes on without it") for record in caplog.records] == [1]
