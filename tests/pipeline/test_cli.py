"""The command line as a user meets it: from any directory, one line per error, Hydra's own switches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(__file__).with_name("cli_with_graph.py")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that has names of ours of its own."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("not: ours\n")
    (tmp_path / "train.py").write_text("raise RuntimeError('the wrong train')\n")
    return tmp_path


def call(directory: Path, command: list[str], fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEMO_FAULT": fault}
    return subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )


def demo(directory: Path, *overrides: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    return call(directory, [str(DEMO), "name=demo", *overrides], fault)


def test_it_runs_from_a_directory_with_its_own_conf_and_train(elsewhere: Path) -> None:
    done = demo(elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"train comes from {ROOT / 'train' / '__init__.py'}" in done.stdout
    assert (elsewhere / "artifacts" / "export").is_dir()


def test_a_reused_run_loads_no_heavy_library(elsewhere: Path) -> None:
    demo(elsewhere)
    done = demo(elsewhere)
    assert done.stdout.count("reused: config, inputs, code and packages unchanged") == 2
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stdout.splitlines()[-2].startswith("train comes from")


def test_the_module_itself_starts_elsewhere_and_shows_its_config(elsewhere: Path) -> None:
    done = call(elsewhere, ["-m", "pipeline", "--cfg", "job", "--resolve"])
    assert done.returncode == 0, done.stderr
    assert "store: artifacts" in done.stdout
    assert "not: ours" not in done.stdout


def test_each_run_has_a_directory_with_metrics_log_and_config(elsewhere: Path) -> None:
    demo(elsewhere, "seed=3")
    (run,) = (elsewhere / "runs").iterdir()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events[0]["config"]["seed"] == 3
    assert events[-1]["status"] == "finished"
    assert "building: never built" in (run / "run.log").read_text()
    assert (run / ".hydra" / "config.yaml").is_file()


def test_multirun_runs_each_job(elsewhere: Path) -> None:
    done = demo(elsewhere, "seed=1,2", "--multirun")
    assert done.returncode == 0, done.stderr
    assert len(list(elsewhere.glob("multirun/*/*/metrics.jsonl"))) == 2
    assert "target.seed 1 → 2" in done.stdout


@pytest.mark.parametrize("override", ["quantise=1", "tracking.nope=1", "seed=many", "tracking=nope"])
def test_an_unknown_key_or_a_wrong_type_is_hydras_error(elsewhere: Path, override: str) -> None:
    done = demo(elsewhere, override)
    assert done.returncode == 1
    assert override.partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_stage_takes_a_name_or_a_list(elsewhere: Path) -> None:
    assert "export" not in demo(elsewhere, "stage=target").stdout
    done = demo(elsewhere, "stage=[target,export]", "force=[target]")
    assert "building: forced" in done.stdout
    assert "building: never built" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "fault", "message"),
    [
        ((), "check", "error: target.size=0 is too small; use 1"),
        (("stage=nope",), "", "error: stage=nope: no such stage; choose from target, export"),
        ((), "full", "no space left on its disk; free some or set store="),
        (("store=/proc/nowhere",), "", "error: store=/proc/nowhere: "),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    elsewhere: Path, overrides: tuple[str, ...], fault: str, message: str
) -> None:
    done = demo(elsewhere, *overrides, fault=fault)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stdout
    (log,) = elsewhere.glob("runs/*/run.log")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eagle.train.max_seconds=inf", "eagle.train.max_seconds=inf is not finite; give a number that is, or null"),
        ("quantize.dampening=nan", "quantize.dampening=nan is not finite"),
        ("generate.temperatures=[0.5,inf]", "generate.temperatures[1]=inf is not finite"),
        ("threads=0", "threads=0 is out of range; use 1 … 1024"),
    ],
)
def test_a_number_that_no_stage_can_have_is_refused_before_any_runs(
    elsewhere: Path, override: str, message: str
) -> None:
    done = call(elsewhere, ["-m", "pipeline", override])
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert "building" not in done.stdout


@pytest.mark.parametrize("is_by_variable", [False, True])
def test_debug_shows_the_traceback_of_a_users_error(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, *, is_by_variable: bool
) -> None:
    if is_by_variable:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = demo(elsewhere, *(() if is_by_variable else ("--debug",)), fault="check")
    assert "Traceback" in done.stderr
    assert "ValueError: target.size=0 is too small" in done.stderr


def test_a_bug_keeps_its_traceback(elsewhere: Path) -> None:
    done = demo(elsewhere, fault="bug")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr
    (metrics,) = elsewhere.glob("runs/*/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["status"] == "failed"


def test_an_interrupted_run_says_how_to_go_on(elsewhere: Path) -> None:
    done = demo(elsewhere, fault="interrupt")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; finished stages are kept, the same command continues\n"


def test_help_whose_reader_goes_away_ends_quietly(elsewhere: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(DEMO), "--help"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_run_directory_that_cannot_be_made_is_one_line(elsewhere: Path) -> None:
    (elsewhere / "runs").write_text("a file")
    done = demo(elsewhere)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
