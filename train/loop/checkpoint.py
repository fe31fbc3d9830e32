"""Checkpoints: everything a run needs to go on as if it had never stopped, on disk whole or not at all.

A checkpoint is a directory `checkpoint-<step>`, written as `checkpoint-<step>.partial` beside it, synced and renamed:

    model.safetensors       trained parameters and persistent buffers
    optimizer.safetensors   the optimizer's state, `<parameter>:<entry>`
    best.safetensors        parameters of the best evaluation so far (a hard link: to this model, or to the last best)
    state.json              position, elapsed time, evaluations, random states; the settings and data it belongs to
    digests.json            sha256 of each of these

The last two are kept. Nothing in them is executed when read: no pickle.
"""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.formats.digest import sha256_file

MODEL, OPTIMIZER, BEST = "model.safetensors", "optimizer.safetensors", "best.safetensors"
STATE, DIGESTS = "state.json", "digests.json"
PARTIAL = ".partial"
NUM_KEPT = 2
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files agree with their digests."""

    path: Path
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        """Trained parameters and buffers by name."""
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state, `<parameter>:<entry>`."""
        return load_file(self.path / OPTIMIZER)

    @property
    def has_best(self) -> bool:
        """Whether anything was evaluated before it."""
        return (self.path / BEST).exists()

    def best(self) -> dict[str, Tensor]:
        """Trained parameters and buffers of the best evaluation so far."""
        return load_file(self.path / BEST)


def write_checkpoint(
    out: Path,
    step: int,
    state: dict[str, Any],
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    *,
    is_best: bool,
    previous: Checkpoint | None,
) -> Checkpoint:
    """Write the checkpoint of `step` into `out`, then remove all but the last two.

    Whatever stands there for a later step is damaged, for the run came to this one from an earlier checkpoint, and is
    removed too. state: JSON values. is_best: whether this model is the best so far; else the best is that of
    `previous`, if any.
    Raises OSError when it cannot be written; earlier checkpoints are then as they were.
    """
    final = out / f"checkpoint-{step:09d}"
    partial = final.with_name(final.name + PARTIAL)
    try:
        for interrupted in out.glob(f"checkpoint-*{PARTIAL}"):
            shutil.rmtree(interrupted)
        partial.mkdir(parents=True)
        save_file(model, partial / MODEL)
        save_file(optimizer, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        if is_best:
            _link(partial / MODEL, partial / BEST)
        elif previous is not None and previous.has_best:
            _link(previous.path / BEST, partial / BEST)
        digests = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
        (partial / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if final.exists():  # damaged: a run continues after its last good checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, final, previous) from error
    found = list_checkpoints(out)
    place = found.index(final)
    for other in (*found[:place], *found[place + NUM_KEPT :]):
        shutil.rmtree(other)
    return Checkpoint(final, state)


def read_last_checkpoint(out: Path) -> Checkpoint | None:
    """The last whole checkpoint in `out`, or None; warns of every damaged one that it passes over."""
    for path in list_checkpoints(out):
        damage = _damage(path)
        if damage is None:
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))
        logger.warning("%s is damaged (%s); training goes on from the one before it", path, damage)
    return None


def list_checkpoints(out: Path) -> list[Path]:
    """Checkpoints in `out`, the last first, damaged ones included."""
    return sorted((path for path in out.glob("checkpoint-*") if path.suffix != PARTIAL), reverse=True)


def _damage(path: Path) -> str | None:
    """The first file that differs from its digest, or None."""
    try:
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
        changed = [name for name, digest in digests.items() if sha256_file(path / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    missing = {MODEL, OPTIMIZER, STATE} - digests.keys()
    if missing or changed:
        return f"{(*sorted(missing), *changed)[0]} differs from its digest"
    return None


def _link(source: Path, target: Path) -> None:
    """A second name for `source`, or a copy where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        shutil.copyfile(source, target)


def _explained(error: OSError | SafetensorError, path: Path, previous: Checkpoint | None) -> OSError:
    """The error as an OSError that says what still stands; safetensors tells the number in its message alone."""
    found = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else errno.EIO
    then = f"{previous.path.name} is intact and training can go on from it" if previous else "there is no earlier one"
    return OSError(number, f"{os.strerror(number or errno.EIO)}: {path.name} was not written; {then}", str(path.parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
