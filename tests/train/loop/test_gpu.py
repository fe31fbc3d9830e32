"""The same loop on one GPU, in a process of its own: accelerate keeps the first device that it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from tests.train.loop.tiny import TinyTask, run
task = TinyTask()
result = run(task, Path(sys.argv[1]), max_tokens=20_000)
print(task.model.head.weight.device.type, result.precision, result.best.tau)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loop_trains_on_a_gpu_in_bfloat16(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    device, precision, tau = done.stdout.split()
    assert (device, precision) == ("cuda", "bf16")
    assert float(tau) > 1.5
