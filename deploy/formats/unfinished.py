"""Names of files that are being written: another one until a file is whole."""

from __future__ import annotations

import os
from pathlib import Path

_SUFFIX = ".tmp"


def unfinished(path: Path) -> Path:
    """Beside `path`, where this process writes what will be renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")


def discard_unfinished(directory: Path) -> None:
    """Remove what writers that were killed left anywhere under `directory`."""
    for path in directory.rglob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
