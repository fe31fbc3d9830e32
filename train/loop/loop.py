"""The training loop: load, step, evaluate, save, for any `Task`, on one process or several."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from train.features import FeatureSource
from train.loop.batches import TokenSequence
from train.loop.log_window import LogWindow
from train.loop.run import Run
from train.loop.settings import TrainSettings
from train.loop.state import TrainResult
from train.loop.task import Task

OnLog = Callable[[int, dict[str, float]], None]
OnProgress = Callable[[float, float], None]


def train(
    task: Task,
    sequences: Sequence[TokenSequence],
    settings: TrainSettings,
    out: Path,
    *,
    seed: int,
    features: FeatureSource | None,
    on_log: OnLog,
    on_progress: OnProgress,
    is_start_trained: bool = False,
) -> TrainResult:
    """Train `task.model` until the budget is used up, and leave the parameters of the best evaluation in it.

    Goes on from the last checkpoint in `out`, if any: with a token or epoch budget, and on as many processes, the
    result is then the same to the bit as without the interruption. A finished run in `out` is only read.

    sequences: what is trained on, e.g. conversations. features: of hidden states, where the task needs them; called
    from one thread, which is a background one where batches are loaded ahead. on_log: called in the main process with
    the step and metrics by name; those of evaluations begin with "heldout/". on_progress: called there after every step
    with the share of the budget that is used up and an estimate of the seconds left, evaluations included.
    is_start_trained: the model was trained before, so it is evaluated as it starts, and stays if nothing is better.
    Raises ValueError for settings that make no sense, for a checkpoint in `out` of another run, and when losses or
    gradients stay non-finite; OSError when a checkpoint cannot be written. Earlier checkpoints then stay as they were.
    """
    run = Run(task, sequences, settings, out, seed=seed)
    run.resume()

    def evaluate() -> None:
        metrics = run.evaluate()
        if run.is_main:
            on_log(run.state.step, {f"heldout/{name}": value for name, value in metrics.items()})

    if is_start_trained and not run.state.evaluations:
        evaluate()
        run.save()
    window = LogWindow(run.state)
    with closing(run.batches(features)) as batches:
        for plan in run.plans():
            outcome = run.step(plan, batches)
            window.add(outcome)
            if run.is_window_over and run.is_main:
                on_log(run.state.step, window.row(run.state, outcome, run.learning_rate))
            if run.is_evaluation_due:
                evaluate()
            if run.is_evaluation_due or run.is_checkpoint_due:
                run.save()
            if run.is_main:
                on_progress(min(run.progress, 1.0), run.seconds_left())
    return run.finish()
