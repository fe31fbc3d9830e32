"""Whatever W&B does, a run goes on; and offline it really records."""

from __future__ import annotations

import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.schema import TrackingConfig, TrackingMode
from pipeline.tracking import make_tracker
from pipeline.tracking.wandb_run import WandbRun


class FakeRun:
    """Remembers the calls; raises in the one called `broken`."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.calls = broken, []
        self.summary = types.SimpleNamespace(update=lambda values: self._call("summary", values))

    def _call(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name == self.broken:
            raise RuntimeError(f"{name} is broken")

    def define_metric(self, name: str, step_metric: str) -> None:
        self._call("define_metric", name)

    def log(self, values: dict[str, Any]) -> None:
        self._call("log", values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
        self._call("log_artifact", artifact.name, artifact.metadata, tuple(aliases))
        return types.SimpleNamespace(wait=lambda: artifact.name)

    def use_artifact(self, artifact: Any) -> None:
        self._call("use_artifact", artifact)

    def finish(self, exit_code: int) -> None:
        self._call("finish", exit_code)


class FakeArtifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.metadata, self.added = name, metadata, []

    def add_reference(self, uri: str, checksum: bool) -> None:
        self.added.append(uri)

    def add_dir(self, path: str) -> None:
        self.added.append(path)


def fake_wandb(run: FakeRun, *, is_logged_in: bool = True, init: Any = None) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.Settings = lambda **settings: settings  # type: ignore[attr-defined]
    module.login = lambda prompt: is_logged_in  # type: ignore[attr-defined]
    module.init = init or (lambda **settings: run)  # type: ignore[attr-defined]
    module.Artifact = FakeArtifact  # type: ignore[attr-defined]
    return module


def config(mode: TrackingMode = TrackingMode.online, **fields: Any) -> TrackingConfig:
    return TrackingConfig(mode=mode, **{"timeout_seconds": 5.0, **fields})


def whole_run(tracker: Any, tmp_path: Path) -> None:
    tracker.start_run({"seed": 0})
    tracker.artifact("target", "target", tmp_path, "aaa", {})
    tracker.log("quantize", {"loss": 1.0}, 1)
    tracker.log("quantize", {"loss": 0.5}, 2)
    tracker.summary("quantize", {"perplexity": 18.0})
    tracker.artifact("quantize", "quantize[gptq]", tmp_path, "bbb", {"target": "aaa"})
    tracker.finish("finished")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_records_values_artifacts_and_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    whole_run(WandbRun(config(), tmp_path), tmp_path)
    assert warnings(caplog) == []
    names = [call[0] for call in run.calls]
    assert names == ["log_artifact", "define_metric", "log", "log", "summary", "use_artifact", "log_artifact", "finish"]
    assert run.calls[5] == ("use_artifact", "target")
    assert run.calls[6][1:] == (
        "quantize-gptq",
        {"instance": "quantize[gptq]", "digest": "bbb", "inputs": {"target": "aaa"}},
        ("latest", "bbb"),
    )
    assert run.calls[-1] == ("finish", 0)


@pytest.mark.parametrize(
    "broken", ["define_metric", "log", "summary", "log_artifact", "use_artifact", "finish", "import", "init", "account"]
)
def test_a_failure_anywhere_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def refuse(**settings: Any) -> None:
        raise SystemExit("init is broken")

    module = fake_wandb(FakeRun(broken), is_logged_in=broken != "account", init=refuse if broken == "init" else None)
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import" else module)
    whole_run(make_tracker(config(), tmp_path), tmp_path)
    assert len(warnings(caplog)) == 1
    assert "W&B tracking is off for the rest of this run" in warnings(caplog)[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_hanging_start_blocks_nothing_and_ends_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(FakeRun(), init=lambda **settings: time.sleep(60)))
    whole_run(WandbRun(config(timeout_seconds=0.1), tmp_path), tmp_path)
    assert len(warnings(caplog)) == 1
    assert "no answer within tracking.timeout_seconds=0.1" in warnings(caplog)[0]


def test_files_are_uploaded_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Remembering(FakeArtifact):
        def __init__(self, *args: Any, **fields: Any) -> None:
            super().__init__(*args, **fields)
            made.append(self)

    module = fake_wandb(FakeRun())
    module.Artifact = Remembering  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for has_files in (False, True):
        whole_run(WandbRun(config(log_files=has_files), tmp_path), tmp_path)
    assert [artifact.added for artifact in made] == [[tmp_path.as_uri()]] * 2 + [[str(tmp_path)]] * 2


def test_without_wandb_mode_only_the_file_is_written(tmp_path: Path) -> None:
    whole_run(make_tracker(config(TrackingMode.none), tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_real_offline_run_leaves_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "a.txt").write_text("x")
    tracker = make_tracker(config(TrackingMode.offline, timeout_seconds=30.0), tmp_path)
    whole_run(tracker, tmp_path / "artifact")
    assert warnings(caplog) == []
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
