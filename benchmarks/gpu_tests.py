"""The kernels' own tests on this device: what is measured afterwards must be right first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import Run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests/deploy/kernels/gpu"
# Most of a test's time on a GPU is compiling, for which every process needs a core.
_PROCESSES = 8


def run_file(file: Path, seconds: float) -> dict[str, Any]:
    """pytest on one file: whether all passed, its last line, and on failure all that it said."""
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", "not slow"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not finished within {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    result: dict[str, Any] = {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr.strip()}
    return result if result["passed"] else result | {"output": done.stdout[-4000:]}


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """File → outcome; `passed` for all of them. In the interpreter one file stands for all, which `make test` runs."""
    files = [FOLDER / "test_packing.py"] if run.is_tiny else sorted(FOLDER.glob("test_*.py"))
    processes = min(_PROCESSES, os.cpu_count() or 1)
    with ThreadPoolExecutor(processes) as pool:
        outcomes = list(pool.map(lambda file: run_file(file, max(1.0, run.deadline - time.monotonic())), files))
    by_file = {file.name: outcome for file, outcome in zip(files, outcomes, strict=True)}
    for name, outcome in by_file.items():
        print(f"{name:28}{outcome['summary']}")
        if "output" in outcome:
            print(outcome["output"])
    return {"passed": all(outcome["passed"] for outcome in outcomes), "files": by_file}
