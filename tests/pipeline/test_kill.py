"""kill -9 at random moments of real runs, and two real runs at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("killable_graph.py")
NUM_STAGES = 4


def start(store: Path, *forced: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(store), *forced]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(store: Path, *forced: str) -> str:
    process = start(store, *forced)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def kill_until_done(store: Path, rng: random.Random, *forced: str) -> int:
    """Run and kill after a random while, until a run gets through; returns the number of kills."""
    kills = 0
    while True:
        process = start(store, *forced)
        try:
            # The graph sleeps for 0.36 s in all, so the first attempt never gets through.
            output, _ = process.communicate(timeout=rng.uniform(0.1, 0.3 + 0.05 * kills))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output
        return kills


def contents(store: Path) -> dict[str, bytes]:
    """Every file of every finished artifact, but for manifests, which hold times."""
    files = (path for path in sorted(store.rglob("*.txt")) if not path.parent.suffix)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def leftovers(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.suffix in (".partial", ".replaced", ".new")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("plain") / "store"
    finish(store)
    return contents(store)


@pytest.mark.parametrize("seed", range(6))
def test_killed_runs_end_with_the_same_artifacts_and_repeat_no_finished_stage(
    tmp_path: Path, uninterrupted: dict[str, bytes], seed: int
) -> None:
    store = tmp_path / "store"
    kills = kill_until_done(store, random.Random(seed))
    assert kills > 0
    assert contents(store) == uninterrupted
    assert leftovers(store) == []
    log = (tmp_path / "store.log").read_text().splitlines()
    # A kill between a stage's last line and its rename repeats that stage: at most once per kill.
    assert sum(line.startswith("built") for line in log) <= NUM_STAGES + kills
    assert sum(line.startswith("step") for line in log) <= 6 + kills
    assert finish(store).count("reused") == NUM_STAGES


def test_killed_rebuilds_never_lose_an_artifact(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    store = tmp_path / "store"
    finish(store)
    rng = random.Random(5)
    for _ in range(6):
        process = start(store, "target", "quantize", "train", "export")
        try:
            process.communicate(timeout=rng.uniform(0.2, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    output = finish(store)
    assert output.count("reused") == NUM_STAGES, output
    assert contents(store) == uninterrupted


def test_two_runs_on_one_store_build_each_stage_once(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    store = tmp_path / "store"
    both = [start(store), start(store)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    log = (tmp_path / "store.log").read_text().splitlines()
    assert sum(line.startswith("built") for line in log) == NUM_STAGES
    assert any("waiting" in output for output in outputs)
    assert contents(store) == uninterrupted


def test_two_forcing_runs_on_one_store_end_well(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    store = tmp_path / "store"
    finish(store)
    both = [start(store, "target", "train"), start(store, "target", "quantize")]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert contents(store) == uninterrupted
    assert leftovers(store) == []
