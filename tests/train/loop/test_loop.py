"""The whole loop on a tiny model: learning, budgets, choice of the best, logs, and going on after an interruption."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.train.loop.tiny import HIDDEN, TinyModel, TinyTask, run, texts
from train.loop.checkpoint import list_checkpoints, read_last_checkpoint
from train.loop.model_state import trained_state
from train.loop.task import Losses

TOKENS = 5000


class InterruptionError(Exception):
    """Stands for whatever stops a run between two lines of the log."""


class NoisySource:
    """Features that depend on the tokens alone, and how often they were asked for."""

    layers = (2,)

    def __init__(self) -> None:
        self.num_captured = 0

    def capture(self, sequences: Any) -> list[npt.NDArray[np.float32]]:
        self.num_captured += len(sequences)
        return [np.sin(np.outer(ids, np.arange(HIDDEN)))[:, None].astype(np.float32) for ids in sequences]


def last_state(out: Path) -> dict[str, Tensor]:
    """Everything of the last checkpoint that must not depend on interruptions."""
    last = read_last_checkpoint(out)
    assert last is not None
    parts = {"model": last.model(), "optimizer": last.optimizer(), "best": last.best()}
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def interrupted_run(out: Path, at_steps: list[int], **options: Any) -> Any:
    """A run that is stopped at each of these steps and started again with a fresh model."""
    for at in at_steps:

        def stop(step: int, row: dict[str, float], at: int = at) -> None:
            if step == at and "loss" in row:
                raise InterruptionError

        with pytest.raises(InterruptionError):
            run(TinyTask(), out, on_log=stop, **options)
        torch.manual_seed(at)  # whatever the next process begins with
    return run(TinyTask(), out, **options)


def test_training_raises_tau_and_lowers_the_loss(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    result = run(TinyTask(), tmp_path, max_tokens=20_000, on_log=lambda _step, row: rows.append(row))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert result.best.tau > 1.5
    assert result.best.tau == max(evaluation.tau for evaluation in result.evaluations)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": TOKENS},
        {"max_tokens": TOKENS, "optimizer": "muon"},
        {"max_epochs": 3.5, "accumulation": 3},
    ],
)
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(TinyTask(), tmp_path / "whole", **options)
    # Checkpoints at every step, at evaluations only, and both in turn.
    for often in (0.0001, 1000.0):
        out = tmp_path / f"{often}"
        pieces = interrupted_run(out, [1, 7, 8, 20], checkpoint_every_seconds=often, **options)
        assert_equal(last_state(out), last_state(tmp_path / "whole"))
        assert (pieces.steps, pieces.tokens, pieces.epochs) == (whole.steps, whole.tokens, whole.epochs)
        metrics = [(evaluation.step, evaluation.metrics) for evaluation in pieces.evaluations]
        assert metrics == [(evaluation.step, evaluation.metrics) for evaluation in whole.evaluations]


@pytest.mark.parametrize("cache_gb", [0.0, 5e-5, 1.0])
def test_features_from_the_cache_train_the_same_as_features_captured_anew(tmp_path: Path, cache_gb: float) -> None:
    source = NoisySource()
    run(TinyTask(), tmp_path / "none", features=source, max_epochs=3)
    options = {"max_epochs": 3, "feature_cache_gb": cache_gb, "checkpoint_every_seconds": 0.0001}
    interrupted_run(tmp_path / "cache", [5, 30], features=NoisySource(), **options)
    assert_equal(last_state(tmp_path / "cache"), last_state(tmp_path / "none"))


def test_the_model_ends_with_the_parameters_of_the_best_evaluation(tmp_path: Path) -> None:
    task = TinyTask(taus=[1.5, 2.5, 2.5, 1.0])
    states: list[dict[str, Tensor]] = []

    def keep(_step: int, row: dict[str, float]) -> None:
        if "heldout/tau" in row:
            states.append({name: tensor.clone() for name, tensor in trained_state(task.model).items()})

    result = run(task, tmp_path, max_tokens=TOKENS, on_log=keep)
    assert [evaluation.tau for evaluation in result.evaluations] == [1.5, 2.5, 2.5, 1.0]
    assert result.best == result.evaluations[1]
    assert_equal(trained_state(task.model), states[1])
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = run(TinyTask(), tmp_path, max_tokens=TOKENS)
    task = TinyTask(TinyModel(seed=5))
    assert run(task, tmp_path, max_tokens=TOKENS) == first
    assert task.num_batches == 0
    best = {name: last_state(tmp_path)[f"best/{name}"] for name in trained_state(task.model)}
    assert_equal(trained_state(task.model), best)


def test_the_token_budget_ends_the_run_at_the_step_that_reaches_it(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    result = run(TinyTask(), tmp_path, max_tokens=1000, on_log=lambda _step, row: rows.append(row))
    tokens = [row["tokens"] for row in rows if "loss" in row]
    assert tokens[-2] < 1000 <= tokens[-1] == result.tokens


def test_the_epoch_budget_shows_every_text(tmp_path: Path) -> None:
    result = run(TinyTask(), tmp_path, max_epochs=2)
    total = sum(min(len(text.token_ids), 32) for text in texts(60, seed=1))
    assert 2 <= result.epochs < 2.2
    assert 2 * total <= result.tokens <= 2 * total + 2 * 64


def test_of_several_budgets_the_first_to_end_counts(tmp_path: Path) -> None:
    result = run(TinyTask(), tmp_path, max_tokens=10**9, max_seconds=3600, max_epochs=0.5)
    assert 0.5 <= result.epochs < 0.8


def test_a_time_budget_goes_on_from_the_elapsed_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is an eighth of a second later, so a run's length in steps is known."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.125
        return now[0]

    monkeypatch.setattr("train.loop.run.time.perf_counter", clock)
    options = {"max_seconds": 4.0, "evaluate_every": 1.0, "checkpoint_every_seconds": 0.5}
    whole = run(TinyTask(), tmp_path / "whole", **options)
    rows: list[dict[str, float]] = []

    def stop(step: int, row: dict[str, float]) -> None:
        rows.append(row)
        if step == 20:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(TinyTask(), tmp_path / "pieces", on_log=stop, **options)
    pieces = run(TinyTask(), tmp_path / "pieces", on_log=lambda _step, row: rows.append(row), **options)
    assert pieces.steps == whole.steps
    assert pieces.elapsed_seconds == whole.elapsed_seconds == 4.0
    repeated = [row["elapsed_seconds"] for row in rows if "loss" in row]
    assert min(after - before for before, after in pairwise(repeated)) > -0.5


def test_evaluations_come_at_shares_of_the_budget(tmp_path: Path) -> None:
    result = run(TinyTask(), tmp_path, max_tokens=10_000, evaluate_every=0.3)
    tokens = [evaluation.tokens for evaluation in result.evaluations]
    assert [math.floor(count / 3000) for count in tokens[:3]] == [1, 2, 3]
    assert tokens[3] == result.tokens
    assert len(tokens) == 4


def test_the_log_holds_means_and_rates(tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    options = {"max_tokens": 2000, "log_every": 4, "evaluate_every": 1.0}
    run(TinyTask(), tmp_path, on_log=lambda step, row: rows.append((step, row)), **options)
    assert [step for step, row in rows if "loss" in row] == [4, 8, 12, 16, 17]
    row = next(row for step, row in rows if step == 4 and "loss" in row)
    assert 0 < row["loss"] < 2 * math.log(37)
    assert 0 <= row["accuracy"] <= 1
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["elapsed_seconds"])
    assert row["gradient_norm"] > 0


def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def rows_of(out: Path, stops: list[int]) -> dict[int, float]:
        rows = dict[int, float]()
        for stop in [*stops, 10**9]:

            def note(step: int, row: dict[str, float], stop: int = stop) -> None:
                if "loss" in row:
                    rows[step] = row["loss"]
                if step >= stop:
                    raise InterruptionError

            with suppress(InterruptionError):
                run(TinyTask(), out, max_tokens=2000, log_every=4, checkpoint_every_seconds=0.0001, on_log=note)
        return rows

    assert rows_of(tmp_path / "pieces", [7, 12]) == rows_of(tmp_path / "whole", [])


def test_a_trained_start_is_kept_when_nothing_is_better(tmp_path: Path) -> None:
    task = TinyTask(taus=[2.5, 1.0, 1.5, 2.5, 1.0])
    before = {name: tensor.clone() for name, tensor in trained_state(task.model).items()}
    result = run(task, tmp_path, max_tokens=TOKENS, is_start_trained=True)
    assert (result.best.step, result.best.tokens, len(result.evaluations)) == (0, 0, 5)
    assert_equal(trained_state(task.model), before)


@pytest.mark.parametrize("stop", [1, 5])  # before there is another checkpoint than that of the start, and behind one
def test_a_trained_start_is_not_evaluated_again_by_a_resumed_run(tmp_path: Path, stop: int) -> None:
    whole = run(TinyTask(), tmp_path / "whole", max_tokens=TOKENS, is_start_trained=True)
    pieces = interrupted_run(tmp_path / "pieces", [stop], max_tokens=TOKENS, is_start_trained=True)
    assert [each.step for each in pieces.evaluations] == [each.step for each in whole.evaluations]
    assert_equal(last_state(tmp_path / "pieces"), last_state(tmp_path / "whole"))
    assert whole.evaluations[0].step == 0


def test_progress_ends_at_one_with_no_time_left(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    run(TinyTask(), tmp_path, max_tokens=2000, on_progress=lambda share, left: seen.append((share, left)))
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[-1] == (1.0, 0.0)
    assert all(left > 0 for _, left in seen[:-1])


class PoisonedTask(TinyTask):
    """Its loss is NaN in the batches with these numbers."""

    poisoned: range = range(0)

    def losses(self, model: torch.nn.Module, batch: Any) -> Losses:
        losses = super().losses(model, batch)
        factor = math.nan if self.num_batches - 1 in self.poisoned else 1.0
        return Losses(losses.total * factor, losses.count, losses.metrics)


def test_a_step_with_a_nan_is_skipped_and_counted(tmp_path: Path) -> None:
    task = PoisonedTask()
    task.poisoned = range(5, 7)  # the second batch of step 3 and the first of step 4
    result = run(task, tmp_path, max_tokens=TOKENS)
    assert result.skipped_steps == 2
    assert all(bool(tensor.isfinite().all()) for tensor in trained_state(task.model).values())


def test_lasting_nans_end_the_run_with_a_remedy_and_keep_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = PoisonedTask()
    task.poisoned = range(20, 10_000)
    with pytest.raises(
        ValueError,
        match=r"13: loss or gradient not finite in 3 steps .* lower learning_rate=0.01 .*/checkpoint-000000010 holds",
    ):
        run(task, tmp_path, max_tokens=TOKENS, max_skipped_steps=3, checkpoint_every_seconds=0.0001, evaluate_every=1.0)
    last = read_last_checkpoint(tmp_path)
    assert last is not None and last.path.name == "checkpoint-000000010"
    assert all(bool(tensor.isfinite().all()) for tensor in last.model().values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate=0.02: .*checkpoint-\d+ was written with learning_rate=0.01"),
        ({"seed": 8}, "seed=8: .* was written with seed=7"),
        ({"sequences": texts(60, seed=2)}, "data=.* was written with data=.*; set it back, or train into an empty"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    run(TinyTask(), tmp_path, max_tokens=1000)
    before = list_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(TinyTask(), tmp_path, **{"max_tokens": 1000, **changed})
    assert list_checkpoints(tmp_path) == before


def test_a_checkpoint_of_a_model_with_another_shape_is_refused(tmp_path: Path) -> None:
    run(TinyTask(), tmp_path, max_tokens=1000)
    task = TinyTask()
    task.model.head = torch.nn.Linear(HIDDEN, 50)
    with pytest.raises(ValueError, match=r"the checkpoint's head.bias is \[37\] and the model's \[50\]"):
        run(task, tmp_path, max_tokens=1000)
