"""Two processes against one, on the same batches of every step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.loop.two_processes import train_without_dropout
from train.loop.checkpoint import Checkpoint, read_last_checkpoint

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("two_processes.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of two_processes.py on two processes."""
    out = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCHER, str(SCRIPT), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def last(out: Path) -> Checkpoint:
    found = read_last_checkpoint(out)
    assert found is not None
    return found


def test_two_processes_train_as_one(two_processes: tuple[Path, str], tmp_path: Path) -> None:
    out, output = two_processes
    losses = next(line for line in output.splitlines() if line.startswith("losses"))
    two = [float(word) for word in losses.split()[1:]]
    one, result = train_without_dropout(tmp_path / "one", accumulation=4)
    assert len(one) > 10
    np.testing.assert_allclose(two, one, rtol=1e-4)
    single, pair = last(tmp_path / "one").model(), last(out / "two").model()
    for name in single.keys() - {"num_forwards"}:
        torch.testing.assert_close(pair[name], single[name], rtol=1e-3, atol=1e-4)
    # One process picks up what two left, and finds it finished.
    losses_left, picked_up = train_without_dropout(out / "two", accumulation=4)
    assert losses_left == []
    assert (picked_up.steps, picked_up.tokens) == (result.steps, result.tokens)


def test_two_processes_interrupted_end_with_the_same_bits(two_processes: tuple[Path, str]) -> None:
    whole, pieces = last(two_processes[0] / "whole"), last(two_processes[0] / "pieces")
    assert whole.path.name == pieces.path.name
    assert whole.state["random"] == pieces.state["random"]
    assert whole.state["random"][0] != whole.state["random"][1]
    for read in (Checkpoint.model, Checkpoint.optimizer, Checkpoint.best):
        expected, found = read(whole), read(pieces)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_batches_that_cannot_be_shared_out_evenly_are_refused(two_processes: tuple[Path, str]) -> None:
    assert (
        "accumulation=3 counts the batches of a step over all processes and is no multiple of their number, 2"
        in (two_processes[1])
    )
