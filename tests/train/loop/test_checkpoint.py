"""Checkpoints: whole or absent, damaged ones passed over, a full disk survived."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.loop.checkpoint import Checkpoint, list_checkpoints, read_last_checkpoint, write_checkpoint
from train.loop.model_state import load_trained_state, trained_state

ROOT = Path(__file__).resolve().parents[3]


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((5, 3), float(step)), "count": torch.tensor(step)}


def write(out: Path, step: int, *, is_best: bool = False, previous: Checkpoint | None = None) -> Checkpoint:
    state = {"step": step}
    return write_checkpoint(
        out, step, state, tensors(step), {"m": torch.ones(step)}, is_best=is_best, previous=previous
    )


def read(out: Path) -> Checkpoint:
    found = read_last_checkpoint(out)
    assert found is not None
    return found


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 3)
    found = read(tmp_path)
    assert found.state == {"step": 3}
    assert {name: tensor.tolist() for name, tensor in found.model().items()} == {"weight": [[3.0] * 3] * 5, "count": 3}
    assert found.optimizer()["m"].tolist() == [1.0] * 3
    assert not found.has_best


def test_an_empty_directory_holds_none(tmp_path: Path) -> None:
    assert read_last_checkpoint(tmp_path / "absent") is None


def test_the_last_two_are_kept_and_the_best_outlives_its_own(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1, is_best=True)
    for step in (2, 9, 10):
        checkpoint = write(tmp_path, step, previous=checkpoint)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-000000010", "checkpoint-000000009"]
    assert read(tmp_path).best()["count"] == 1
    checkpoint = write(tmp_path, 11, is_best=True, previous=checkpoint)
    assert read(tmp_path).best()["count"] == 11


def test_without_hard_links_the_best_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write(tmp_path, 2, previous=write(tmp_path, 1, is_best=True))
    assert read(tmp_path).best()["count"] == 1


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json", "digests.json"]
)
@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    first = write(tmp_path, 1)
    damaged = write(tmp_path, 2, is_best=True, previous=first).path / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.unlink()
    if how != "missing":
        damaged.write_bytes(content if how == "flipped" else content[:-1])
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path).state == {"step": 1}
    assert "checkpoint-000000002 is damaged" in caplog.text
    # The run then comes to the same step again.
    write(tmp_path, 2, previous=first)
    assert read(tmp_path).state == {"step": 2}


def test_all_damaged_is_like_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (write(tmp_path, step).path / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert read_last_checkpoint(tmp_path) is None
    assert len(caplog.records) == 2


def test_damaged_later_ones_go_when_a_run_comes_by_again(tmp_path: Path) -> None:
    first = write(tmp_path, 3, is_best=True)
    for step in (10, 20):
        (write(tmp_path, step, previous=first).path / "state.json").write_text("{")
    shutil.rmtree(first.path, ignore_errors=True)
    assert read_last_checkpoint(tmp_path) is None
    best = write(tmp_path, 5, is_best=True)
    assert list_checkpoints(tmp_path) == [best.path]
    write(tmp_path, 12, previous=best)
    assert read(tmp_path).best()["count"] == 5


def test_what_an_interrupted_write_left_is_ignored_and_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for step in (2, 3):
        partial = tmp_path / f"checkpoint-00000000{step}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
    assert read(tmp_path).state == {"step": 1}
    write(tmp_path, 2)
    assert read(tmp_path).state == {"step": 2}
    assert sorted(tmp_path.iterdir(), reverse=True) == list_checkpoints(tmp_path)


def test_the_files_are_tensors_and_json(tmp_path: Path) -> None:
    """Nothing that is executed when read."""
    names = {path.name for path in write(tmp_path, 1, is_best=True).path.iterdir()}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_for_the_best_is_no_reason_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(OSError, match="there is no earlier one") as caught:
        write(tmp_path, 1, is_best=True)
    assert caught.value.errno == number


FILL = """
import sys, torch
from pathlib import Path
from train.loop.checkpoint import read_last_checkpoint, write_checkpoint
out = Path(sys.argv[1])
last = None
for step, size in enumerate((1000, 100_000, 1_000_000)):
    try:
        last = write_checkpoint(out, step, {"step": step}, {"a": torch.ones(size)}, {}, is_best=True, previous=last)
    except OSError as error:
        print("ERROR", error.errno, error)
print("LAST", read_last_checkpoint(out).state, sorted(path.name for path in out.iterdir()))
"""


def test_a_real_full_disk_leaves_the_earlier_checkpoints_intact(tmp_path: Path) -> None:
    script, disk = tmp_path / "fill.py", tmp_path / "disk"
    script.write_text(FILL)
    disk.mkdir()
    namespace = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    command = [*namespace, "sh", "-c", f"{mount} && exec {sys.executable} {script} {disk}/out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"ERROR {errno.ENOSPC} " in done.stdout, done.stdout + done.stderr
    assert (
        "No space left on device: checkpoint-000000002 was not written; checkpoint-000000001 is intact" in done.stdout
    )
    assert "LAST {'step': 1} ['checkpoint-000000000', 'checkpoint-000000001']" in done.stdout


class Tied(nn.Module):
    """A parameter under two names, a frozen one, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(4))
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.register_buffer("seen", torch.rand(2))
        self.register_buffer("table", torch.rand(9), persistent=False)


def test_the_trained_state_is_what_training_changes() -> None:
    assert set(trained_state(Tied())) == {"embed.weight", "scale", "seen"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("seen", r"seen is missing and the model's \[2\]"), ("new", r"new is \[3\] and the model's missing")],
)
def test_a_state_of_another_model_is_refused(name: str, message: str) -> None:
    state = trained_state(Tied())
    state = {**state, name: torch.zeros(3)} if name == "new" else {k: v for k, v in state.items() if k != name}
    with pytest.raises(ValueError, match=message):
        load_trained_state(Tied(), state)
