"""The record of a training: whole after a kill, small enough to plot, without times unless time was the budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.stages.training_history import POINTS, LossLog, history, write_history
from train.loop.state import Evaluation


def row(step: int, loss: float) -> dict[str, float]:
    return {"loss": loss, "tokens": 100.0 * step, "tokens_per_second": 3.0}


def test_a_step_that_was_trained_again_counts_once_and_with_its_last_loss(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    for step, loss in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 4.0), (3, 3.0)):
        log.add(step, row(step, loss))
    expected = [(100, 5.0), (200, 4.0), (300, 3.0)]
    assert [(point["tokens"], point["loss"]) for point in LossLog(tmp_path / "loss.jsonl").curve(99)] == expected


def test_steps_that_a_killed_run_made_beyond_the_end_are_left_out(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    for step in range(1, 6):
        log.add(step, row(step, 1.0))
    told = history(log, [Evaluation(3, 300, 1.0, {"tau": 1.0})], with_seconds=True)
    assert [point["tokens"] for point in told["training"]] == [100, 200, 300]


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    log.add(1, row(1, 5.0))
    with (tmp_path / "loss.jsonl").open("a") as stream:
        stream.write('{"step": 2, "tok\n')
    log.add(2, row(2, 4.0))
    assert [point["loss"] for point in log.curve(99)] == [5.0, 4.0]


def test_rows_of_evaluations_are_no_losses(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    log.add(1, {"heldout/tau": 1.5})
    assert log.curve(99) == []


@pytest.mark.parametrize("num_rows", [1, POINTS, POINTS + 1, 5 * POINTS - 3])
def test_the_curve_has_few_points_that_average_all_rows(tmp_path: Path, num_rows: int) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    for step in range(1, num_rows + 1):
        log.add(step, row(step, float(step)))
    curve = log.curve(num_rows)
    size = -(-num_rows // POINTS)
    assert len(curve) == -(-num_rows // size) <= POINTS
    assert curve[-1]["tokens"] == 100 * num_rows
    assert curve[0]["loss"] == (size + 1) / 2


@pytest.mark.parametrize("with_seconds", [True, False])
def test_seconds_are_written_only_where_time_was_the_budget(tmp_path: Path, with_seconds: bool) -> None:
    evaluations = [Evaluation(7, 700, 12.34, {"tau": 1.5})]
    found = history(LossLog(tmp_path / "none"), evaluations, with_seconds=with_seconds)
    write_history(tmp_path / "h.json", found)
    (written,) = json.loads((tmp_path / "h.json").read_text())["evaluations"]
    assert written == {"step": 7, "tokens": 700, "seconds": 12.3 if with_seconds else None, "metrics": {"tau": 1.5}}
