"""The store itself: replacement, recovery, locks, disks that refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.locking import build_lock, use_lock
from pipeline.store import Artifact, Store

ROOT = Path(__file__).resolve().parents[2]


def test_an_interrupted_replacement_is_undone_when_the_new_one_is_missing(bench: Any) -> None:
    path = bench.run([bench.stage("target")])[0].artifact.path
    path.rename(path.with_name(path.name + ".replaced"))
    bench.run([bench.stage("target")])
    assert bench.built == []
    assert any("its rebuild was interrupted" in line for line in bench.lines)
    assert path.is_dir()


def test_an_interrupted_replacement_is_finished_when_the_new_one_is_there(bench: Any) -> None:
    path = bench.run([bench.stage("target")])[0].artifact.path
    old = path.with_name(path.name + ".replaced")
    shutil.copytree(path, old)
    bench.run([bench.stage("target")], force=("target",))
    assert not old.exists()


def test_an_artifact_that_was_replaced_meanwhile_is_not_used(bench: Any) -> None:
    artifact = bench.run([bench.stage("target")])[0].artifact
    fields = json.loads((artifact.path / "manifest.json").read_text())
    (artifact.path / "manifest.json").write_text(json.dumps({**fields, "content": "other"}))
    with pytest.raises(StoreError, match="rebuilt by another run"), bench.store.using(artifact, print):
        pass


def test_a_waiting_run_says_for_whom(tmp_path: Path) -> None:
    lines: list[str] = []
    entered = threading.Event()

    def wait() -> None:
        with build_lock(tmp_path / "x", "target/abc", lines.append):
            entered.set()

    waiting = threading.Thread(target=wait)
    with build_lock(tmp_path / "x", "target/abc", lines.append):
        waiting.start()
        assert not entered.wait(0.3)
    waiting.join(10)
    assert entered.is_set()
    assert len(lines) == 1
    assert "is building target/abc; waiting" in lines[0]
    assert "another run (pid " in lines[0]


def test_readers_share_and_a_replacement_waits_for_them(tmp_path: Path) -> None:
    lines: list[str] = []
    replaced = threading.Event()

    def replace() -> None:
        with use_lock(tmp_path / "x", "target/abc", lines.append, exclusive=True):
            replaced.set()

    waiting = threading.Thread(target=replace)
    with use_lock(tmp_path / "x", "a", lines.append), use_lock(tmp_path / "x", "b", lines.append):
        waiting.start()
        assert not replaced.wait(0.3)
    waiting.join(10)
    assert replaced.is_set()
    assert lines == ["another run is reading target/abc; waiting"]


def test_a_store_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"store=.*file/artifacts: .*set store= to"):
        Store(tmp_path / "file" / "artifacts").prepare()


def test_a_read_only_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(StoreError, match=r"not writable \(Read-only file system\); set store= to a writable"):
        Store(tmp_path).prepare()


def test_nothing_is_found_where_nothing_was_built(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("target", "abc") is None
    assert store.history("target", "target") == []


FILL = """
import sys
from pathlib import Path
from pipeline.graph import Stage
from pipeline.run import run_pipeline
from pipeline.store import Store
from pipeline.tracking import Trackers

def small(context):
    (context.out / "a").write_bytes(b"x" * 1000)

def large(context):
    (context.out / "b").write_bytes(b"x" * 3_000_000)

store = Store(Path(sys.argv[1]))
first = Stage("first", "first", 1, {}, small)
second = Stage("second", "second", 1, {}, large, {"first": first})
try:
    run_pipeline([second], store, Trackers([]), print)
except ValueError as error:
    print("ERROR", error)
print("LEFT", sorted(path.name for path in (store.root / "second").iterdir()))
run_pipeline([first], store, Trackers([]), print)
"""


def run_on_small_disk(tmp_path: Path, mount_options: str) -> str:
    """Output of FILL with its store on a fresh tmpfs; skips where none can be mounted."""
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o {mount_options} tmpfs {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    command = f"{mount} && exec {sys.executable} {script} {disk}/artifacts"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*namespace, "sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.stdout + done.stderr


def test_a_real_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    output = run_on_small_disk(tmp_path, "size=1m")
    assert "ERROR store=" in output
    assert "no space left on its disk" in output
    assert "LEFT []" in output
    assert "first                  reused" in output


def test_a_real_read_only_disk_is_refused_before_work(tmp_path: Path) -> None:
    output = run_on_small_disk(tmp_path, "ro")
    assert "not writable (Read-only file system); set store= to a writable directory" in output
    assert "building" not in output


def test_find_refuses_a_manifest_of_another_artifact(bench: Any) -> None:
    artifact = bench.run([bench.stage("target")])[0].artifact
    shutil.copytree(artifact.path, artifact.path.with_name("0" * 20))
    assert not isinstance(bench.store.find("target", "0" * 20), Artifact)
