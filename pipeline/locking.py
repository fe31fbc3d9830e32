"""Locks that let two runs share one store.

Two kinds per artifact: a *build* lock, so that one run builds while others wait and then reuse; and a *use*
lock, shared by the runs that read the artifact and exclusive while a rebuild swaps its directory. Both end with
the process, kill -9 included. Order, which rules out deadlock: build lock of a stage, use lock of an artifact
that it continues, use locks of its inputs, use lock of itself; inputs always come earlier in the graph, and use locks
are exclusive for no longer than two renames.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.1

Announce = Callable[[str], None]


@contextmanager
def build_lock(path: Path, what: str, announce: Announce) -> Iterator[None]:
    """Hold the build lock at `path`; says through `announce` who is building `what` when it must wait."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    holder = path.with_name(path.name + ".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"another run ({_read_holder(holder)}) is building {what}; waiting")
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        holder.write_text(json.dumps({"pid": os.getpid()}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def use_lock(path: Path, what: str, announce: Announce, *, exclusive: bool = False) -> Iterator[None]:
    """Hold the use lock at `path`: shared while reading `what`, exclusive while replacing it."""
    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with path.with_name(path.name + ".use").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"another run is {'reading' if exclusive else 'replacing'} {what}; waiting")
            while not _try_flock(stream.fileno(), operation):
                time.sleep(POLL_SECONDS)
        yield


def _try_flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(path: Path) -> str:
    """Who holds a build lock, as text; the file may be half-written or just gone."""
    try:
        return f"pid {json.loads(path.read_text(encoding='utf-8'))['pid']}"
    except (OSError, ValueError, KeyError):
        return "pid unknown"
