"""The tests of the kernels and of the whole backend on this device: what is measured afterwards must be right first."""

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
FOLDER = "tests/deploy/kernels/gpu"
BACKEND = "tests/deploy/runtime/test_gpu_interpreted.py"
# Most of a test's time on a GPU goes into compiling, on one core.
_MAX_PROCESSES = 12


def pytest(arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


def collect(path: str) -> list[str]:
    """Ids of the tests below `path`. Raises RuntimeError where pytest cannot collect them."""
    done = pytest(["--collect-only", path], 60)
    if done.returncode != 0:
        raise RuntimeError(f"pytest cannot collect {path}:\n{done.stdout[-4000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_share(ids: list[str], seconds: float) -> dict[str, Any]:
    """pytest on these tests: whether all passed, its last line, and on failure the end of what it said."""
    try:
        done = pytest(ids, seconds)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"{len(ids)} tests not finished within {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    result: dict[str, Any] = {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr.strip()}
    return result if result["passed"] else result | {"output": done.stdout[-4000:]}


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """`passed` for all tests, and the outcome of every process that ran a share of them.

    In the interpreter one file stands for all, which `make test` runs.
    """
    ids = collect(f"{FOLDER}/test_packing.py") if run.is_tiny else [*collect(FOLDER), *collect(BACKEND)]
    processes = min(_MAX_PROCESSES, os.cpu_count() or 1, len(ids))
    seconds = max(1.0, run.deadline - time.monotonic())
    with ThreadPoolExecutor(processes) as pool:
        outcomes = list(pool.map(lambda index: run_share(ids[index::processes], seconds), range(processes)))
    for outcome in outcomes:
        print(outcome["summary"])
        if "output" in outcome:
            print(outcome["output"])
    return {"passed": all(outcome["passed"] for outcome in outcomes), "tests": len(ids), "processes": outcomes}
