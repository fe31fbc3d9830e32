"""kill -9 at random moments of real training processes, and going on after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from train.loop.checkpoint import list_checkpoints, read_last_checkpoint

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("killed_training.py")


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    begun_at = [int(line) for line in done.stdout.split()]
    assert begun_at == sorted(begun_at)
    assert begun_at[0] == 1 and begun_at[-1] > 10  # attempts did go on from the one before
    whole, killed = read_last_checkpoint(tmp_path / "whole"), read_last_checkpoint(tmp_path / "killed")
    assert whole is not None and killed is not None and whole.path.name == killed.path.name
    for read in ("model", "optimizer", "best"):
        expected, found = getattr(whole, read)(), getattr(killed, read)()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert whole.state["random"] == killed.state["random"]
    left = sorted((tmp_path / "killed").iterdir(), reverse=True)
    assert left == list_checkpoints(tmp_path / "killed") and len(left) == 2
