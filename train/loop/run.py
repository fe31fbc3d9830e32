"""A run: its state, how a step and an evaluation change it, and how it is kept on disk and picked up again.

Every process holds the same `TrainState` and decides from it alone what comes next; the clock is the main process's.
"""

import json
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)

from train.features import FeatureSource
from train.loop.batches import Batch, BatchPlan, StepPlan, TokenSequence
from train.loop.checkpoint import Checkpoint, read_last_checkpoint, write_checkpoint
from train.loop.loading import FeatureCache, load_batches, prefetched
from train.loop.model_state import load_trained_state, trained_state
from train.loop.random_state import random_state, restore_random_state
from train.loop.settings import TrainSettings
from train.loop.state import Evaluation, TrainResult, TrainState
from train.loop.step import StepOutcome, Stepper
from train.loop.task import Task

BYTES_PER_GB = 10**9
FREE_SETTINGS = frozenset(
    {"checkpoint_every_seconds", "feature_cache_gb", "prefetch", "log_every", "max_skipped_steps"}
)
"""Settings that may change between a checkpoint and the run that goes on from it: the result is the same."""

logger = logging.getLogger(__name__)


class Run:
    """One training run on one of `num_processes` processes. See `train.loop.loop.train` for the arguments."""

    def __init__(
        self, task: Task, sequences: Sequence[TokenSequence], settings: TrainSettings, out: Path, *, seed: int
    ) -> None:
        settings.check()
        self._accelerator = _make_accelerator()
        self._num_processes = self._accelerator.num_processes
        if settings.accumulation % self._num_processes:
            raise ValueError(
                f"accumulation={settings.accumulation} counts the batches of a step over all processes and is no "
                f"multiple of their number, {self._num_processes}; make it one"
            )
        set_seed(seed, device_specific=True)
        self._task, self._settings, self._out = task, settings, out
        self._plan = BatchPlan(
            sequences, tokens_per_batch=settings.tokens_per_batch, max_length=settings.max_length, seed=seed
        )
        self._stepper = Stepper(task, settings, self._accelerator)
        self._identity = _identity(settings, seed, self._plan)
        self._checkpoint: Checkpoint | None = None
        self._saved_at = 0.0
        self._skipped_in_a_row = 0
        self.is_evaluation_due = False
        self.learning_rate = 0.0
        self._clock = time.perf_counter()
        self.state = TrainState()

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self._accelerator.is_main_process

    @property
    def progress(self) -> float:
        """Share of the budget that is used up; at least 1 at the end."""
        state = self.state
        epochs = self._plan.epochs(state.position)
        return self._settings.progress(seconds=state.elapsed_seconds, tokens=state.tokens, epochs=epochs)

    def resume(self) -> None:
        """Go on from the last whole checkpoint, if there is any.

        Raises ValueError when it belongs to a run with another seed, other settings or other data.
        """
        found = [read_last_checkpoint(self._out) if self.is_main else None]
        broadcast_object_list(found)
        checkpoint = self._checkpoint = found[0]
        if checkpoint is None:
            return
        _check_identity(checkpoint, self._identity)
        load_trained_state(self._task.model, checkpoint.model())
        self._stepper.optimizer.load_state(checkpoint.optimizer())
        states = checkpoint.state["random"]
        if self._accelerator.process_index < len(states):
            restore_random_state(states[self._accelerator.process_index])
        self.state = TrainState.from_json(checkpoint.state["train"])
        self._saved_at = self.state.elapsed_seconds
        if self.is_main:
            logger.info("training goes on from %s", checkpoint.path)

    def batches(self, features: FeatureSource | None) -> Generator[Batch, None, None]:
        """This process's batches from the state's position on; with features, loaded ahead if the settings say so."""
        cache = None
        if features is not None:
            cache = FeatureCache(features, self._plan, int(self._settings.feature_cache_gb * BYTES_PER_GB))
        rank, steps = self._accelerator.process_index, self._remaining_steps()
        batches = load_batches(self._plan, steps, rank=rank, num_processes=self._num_processes, cache=cache)
        ahead = self._settings.resolve_prefetch(self._accelerator.device)
        return batches if cache is None or ahead == 0 else prefetched(batches, ahead)

    def plans(self) -> Generator[StepPlan, None, None]:
        """What goes into each step from the state's position on, until the budget is used up."""
        self._clock = time.perf_counter()
        for plan in self._remaining_steps():
            if self.progress >= 1:
                return
            yield plan

    def step(self, plan: StepPlan, batches: Iterator[Batch]) -> StepOutcome:
        """One optimizer step. Raises ValueError after `max_skipped_steps` skipped ones in a row."""
        before = self.progress
        self.learning_rate = self._settings.learning_rate_at(before)
        outcome = self._stepper.step(batches, self._settings.accumulation // self._num_processes, self.learning_rate)
        self.state.step += 1
        self.state.tokens += plan.num_tokens
        self.state.position = plan.end
        self.state.elapsed_seconds += self._lap()
        self._guard(outcome)
        due = self._evaluations_due(self.progress) > self._evaluations_due(before)
        self.is_evaluation_due = due or self.progress >= 1
        return outcome

    @property
    def is_window_over(self) -> bool:
        """Whether the steps since the last row of the log make another one."""
        return self.is_evaluation_due or self.state.step % self._settings.log_every == 0

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether it is time for one. None is written while steps are being skipped, for the parameters may be lost,
        and none within a window of the log, whose sums would be."""
        age = self.state.elapsed_seconds - self._saved_at
        is_old = age >= self._settings.checkpoint_every_seconds
        return is_old and self.is_window_over and self._skipped_in_a_row == 0

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics now, which enter the state."""
        metrics = self._stepper.evaluate()
        state = self.state
        state.evaluations.append(Evaluation(state.step, state.tokens, state.elapsed_seconds, metrics))
        state.evaluation_seconds += self._lap()
        return metrics

    def save(self) -> None:
        """Write a checkpoint. Raises OSError when that fails."""
        states = gather_object([random_state()])
        written = [self._write(states) if self.is_main else None]
        broadcast_object_list(written)
        self._checkpoint = written[0]
        self._saved_at = self.state.elapsed_seconds
        self._lap()

    def seconds_left(self) -> float:
        """Estimated seconds to the end of the budget, evaluations included."""
        done, state = self.progress, self.state
        training = state.elapsed_seconds * (1 - done) / done
        num_done = sum(evaluation.step > 0 for evaluation in state.evaluations)
        num_left = max(self._evaluations_due(1.0) - num_done, 0)
        evaluating = num_left * state.evaluation_seconds / max(len(state.evaluations), 1)
        return max(training + evaluating, 0.0)

    def finish(self) -> TrainResult:
        """Put the parameters of the best evaluation into the model, which is left in evaluation mode."""
        assert self._checkpoint is not None  # the last step evaluates and saves
        load_trained_state(self._task.model, self._checkpoint.best())
        self._task.model.eval()
        state = self.state
        return TrainResult(
            steps=state.step,
            tokens=state.tokens,
            epochs=self._plan.epochs(state.position),
            elapsed_seconds=state.elapsed_seconds,
            evaluation_seconds=state.evaluation_seconds,
            skipped_steps=state.skipped_steps,
            precision=self._stepper.precision,
            num_processes=self._num_processes,
            num_sequences=self._plan.num_sequences,
            num_learned=self._plan.num_learned,
            best=state.best,
            evaluations=tuple(state.evaluations),
        )

    def _write(self, random_states: list[dict[str, Any]]) -> Checkpoint:
        evaluations = self.state.evaluations
        return write_checkpoint(
            self._out,
            self.state.step,
            {"identity": self._identity, "train": self.state.to_json(), "random": random_states},
            trained_state(self._task.model),
            self._stepper.optimizer.state(),
            is_best=bool(evaluations) and self.state.best.step == self.state.step,
            previous=self._checkpoint,
        )

    def _remaining_steps(self) -> Iterator[StepPlan]:
        return self._plan.steps(self.state.position, self._settings.accumulation)

    def _evaluations_due(self, progress: float) -> int:
        return int(progress / self._settings.evaluate_every + 1e-9)

    def _lap(self) -> float:
        """Seconds since the last lap by the main process's clock, in every process."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._num_processes == 1:
            return seconds
        shared = torch.tensor(seconds, dtype=torch.float64, device=self._accelerator.device)
        return float(broadcast(shared).item())

    def _guard(self, outcome: StepOutcome) -> None:
        if outcome.is_finite:
            self._skipped_in_a_row = 0
            return
        self.state.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < self._settings.max_skipped_steps:
            return
        kept = f"{self._checkpoint.path} holds the last good parameters" if self._checkpoint else "nothing was saved"
        raise ValueError(
            f"step {self.state.step}: loss or gradient not finite in {self._skipped_in_a_row} steps in a row (loss "
            f"{outcome.loss / max(outcome.count, 1.0)}, gradient norm {outcome.gradient_norm}); lower "
            f"learning_rate={self._settings.learning_rate} or clip={self._settings.clip}, or set precision=fp32 "
            f"(now {self._stepper.precision}); {kept}"
        )


def _make_accelerator() -> Accelerator:
    # Buffers are the same everywhere, and large where one holds the target's embedding: not sent at every step.
    wrapper = DistributedDataParallelKwargs(broadcast_buffers=False)
    # Without `cpu`, accelerate takes several processes without a GPU for as many runs of one.
    is_cpu = not torch.cuda.is_available()
    return Accelerator(mixed_precision="no", cpu=is_cpu, kwargs_handlers=[wrapper])


def _identity(settings: TrainSettings, seed: int, plan: BatchPlan) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it, as JSON values."""
    kept = {name: value for name, value in asdict(settings).items() if name not in FREE_SETTINGS}
    return dict(json.loads(json.dumps({"seed": seed, **kept, "data": plan.digest()})))


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    saved = checkpoint.state["identity"]
    for name in sorted(identity.keys() | saved.keys()):
        if identity.get(name) != saved.get(name):
            raise ValueError(
                f"{name}={identity.get(name)}: {checkpoint.path} was written with {name}={saved.get(name)}; "
                f"set it back, or train into an empty directory"
            )
