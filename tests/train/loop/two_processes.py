"""What each process of test_processes.py runs: `python -m torch.distributed.run … two_processes.py OUT`.

Prints the refusal of an accumulation that two processes cannot share, then the loss of every step of a run in
OUT/two. Then it trains with dropout, in OUT/whole without and in OUT/pieces with an interruption.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.train.loop.tiny import TinyModel, TinyTask, run
from train.loop.batches import Batch
from train.loop.state import TrainResult
from train.loop.task import Losses

OPTIONS: dict[str, Any] = {"max_tokens": 4000, "learning_rate": 3e-3}


def train_without_dropout(out: Path, accumulation: int) -> tuple[list[float], TrainResult]:
    """Losses of every step; no two numbers of processes draw a dropout alike."""
    losses: list[float] = []

    def keep(_step: int, row: dict[str, float]) -> None:
        losses.extend([row["loss"]] if "loss" in row else [])

    task = TinyTask(TinyModel(dropout=0.0))
    return losses, run(task, out, on_log=keep, accumulation=accumulation, **OPTIONS)


class InterruptedTask(TinyTask):
    """Ends with an error, on every process alike."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        if self.num_batches == 11:
            raise InterruptedError
        return super().losses(model, batch)


def main(out: Path, *, is_main: bool) -> None:
    try:
        train_without_dropout(out / "two", accumulation=3)
    except ValueError as error:
        if is_main:
            print(error, flush=True)
    losses, _ = train_without_dropout(out / "two", accumulation=4)
    assert bool(losses) == is_main
    if is_main:
        print("losses", *losses, flush=True)
    options = {"max_tokens": 2500, "checkpoint_every_seconds": 0.001}
    run(TinyTask(), out / "whole", **options)
    with suppress(InterruptedError):
        run(InterruptedTask(), out / "pieces", **options)
    run(TinyTask(), out / "pieces", **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), is_main=os.environ["RANK"] == "0")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    # Torch's own threads may not have ended yet, and on a busy machine the interpreter's end then aborts a process that
    # has done its work ("terminate called without an active exception").
    os._exit(0)
