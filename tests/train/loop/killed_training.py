"""Trains once without and once with interruptions by SIGKILL: `python killed_training.py OUT SEED`, for test_kill.py.

Every attempt is a process of its own, forked, so that torch is loaded once; the parent computes nothing. Prints the
step that each attempt began with.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

import torch

from tests.train.loop.tiny import TinyTask, run

NUM_KILLS = 4


def start(out: Path) -> tuple[int, BinaryIO]:
    """Starts training into `out`; the process and a stream of the lines `step` that it writes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.close(reader)
        options = {"max_tokens": 8_000, "checkpoint_every_seconds": 0.02, "evaluate_every": 0.1}
        run(TinyTask(), out, on_log=lambda step, _row: os.write(writer, f"{step}\n".encode()), **options)
        os._exit(0)
    os.close(writer)
    return pid, os.fdopen(reader, "rb")


def kill_after_some_steps(pid: int, steps: BinaryIO, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 12)):
        steps.readline()
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the process had ended before it was killed"


if __name__ == "__main__":
    out, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    whole, _whole_steps = start(out / "whole")
    assert os.waitpid(whole, 0)[1] == 0
    for _ in range(NUM_KILLS):
        attempt, steps = start(out / "killed")
        print(int(steps.readline()), flush=True)
        kill_after_some_steps(attempt, steps, rng)
    last, steps = start(out / "killed")
    print(int(steps.readline()))
    assert os.waitpid(last, 0)[1] == 0
