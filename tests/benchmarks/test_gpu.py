"""The GPU benchmark without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_whole_script_runs_in_the_interpreter(tmp_path: Path) -> None:
    done = run("--tiny", "--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["is_tiny"] and found["machine"]["gpu"] is None
    assert found["tests"]["passed"] and found["tests"]["tests"] == 5 and found["linear"]["passed"]
    assert set(found["ceilings"]) == {"read_gb_s", "copy_gb_s", "matmul_tflop_s"}
    for layer in found["linear"]["layers"].values():
        assert layer["error"] < 1e-5
        assert set(layer["rows"]) == {"1", "3", "17"}
    for model in found["forward"]["models"].values():
        assert set(model["contexts"]["4"]) == {"1", "2"}
    assert set(found["hierarchy"]["modes"]) == {"plain", "eagle-tree", "cascade"}


@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = run()
    assert done.returncode == 1 and "needs a CUDA device; --tiny" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "message"),
    [("tests,backward", "backward not known"), ("linear", "are measured against the ceilings")],
)
def test_parts_that_do_not_fit_are_refused(parts: str, message: str) -> None:
    done = run("--tiny", "--parts", parts)
    assert done.returncode == 2 and message in done.stderr
