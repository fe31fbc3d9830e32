"""An intermediate model in the training loop: it learns what a target says, and goes on after an interruption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.intermediate.adapters import AdapterSizes, add_adapters
from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import Tokens
from train.intermediate.rollout import HeldOutTexts
from train.intermediate.task import IntermediateTask
from train.loop.loop import train
from train.loop.settings import TrainSettings
from train.loop.state import TrainResult


class InterruptionError(Exception):
    """In place of a kill: nothing is written after it."""


def written_texts(tiny: Any, count: int, seed: int) -> list[Any]:
    """Texts that a target really wrote: 4 random tokens, then 24 of its own."""
    target = tiny.lm(seed=7)
    prompts = torch.randint(1, tiny.vocab_size, (count, 4), generator=torch.Generator().manual_seed(seed))
    written = target.generate(prompts, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [tiny.Text(ids.numpy().astype(np.int32), ((4, 28),)) for ids in written]


def make_task(tiny: Any, *, with_adapters: bool = False) -> IntermediateTask:
    model = LanguageModel(tiny.lm(seed=1, num_hidden_layers=2, initializer_range=0.1))
    if with_adapters:
        torch.manual_seed(5)
        add_adapters(model.lm, AdapterSizes(4, 8))
    return IntermediateTask(model, Tokens(tiny.vocabulary(47)), HeldOutTexts(written_texts(tiny, 40, 0)[:9]), 3)


def run(tiny: Any, task: IntermediateTask, out: Path, *, stop_after: int | None = None) -> TrainResult:
    settings = TrainSettings(
        learning_rate=5e-3,
        max_tokens=8_000,
        tokens_per_batch=128,
        max_length=64,
        evaluate_every=0.25,
        checkpoint_every_seconds=1e-4,
        precision="fp32",
    )

    def on_progress(_share: float, _seconds: float) -> None:
        nonlocal stop_after
        if stop_after is not None:
            stop_after -= 1
            if stop_after < 0:
                raise InterruptionError

    return train(
        task,
        written_texts(tiny, 40, 0),
        settings,
        out,
        seed=3,
        features=None,
        on_log=lambda _step, _metrics: None,
        on_progress=on_progress,
    )


def test_acceptance_rises_and_the_best_checkpoint_is_what_is_left(tmp_path: Path, tiny: Any) -> None:
    task = make_task(tiny)
    before = task.replay(task.model)["tau"]
    result = run(tiny, task, tmp_path)
    assert result.best.tau == max(evaluation.tau for evaluation in result.evaluations) > before + 0.2
    assert task.replay(task.model)["tau"] == result.best.tau
    assert {"tau", "acceptance_1", "acceptance_3", "outside_vocabulary"} <= result.best.metrics.keys()


@pytest.mark.parametrize("with_adapters", [False, True])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, tiny: Any, with_adapters: bool) -> None:
    whole = make_task(tiny, with_adapters=with_adapters)
    run(tiny, whole, tmp_path / "whole")
    for stop_after in (7, 31):
        with pytest.raises(InterruptionError):
            run(tiny, make_task(tiny, with_adapters=with_adapters), tmp_path / "parts", stop_after=stop_after)
    resumed = make_task(tiny, with_adapters=with_adapters)
    run(tiny, resumed, tmp_path / "parts")
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
