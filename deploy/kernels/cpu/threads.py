"""How many threads to use: what the process may run on, not what the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

THREADS_VARIABLE = "UNDERSTUDY_THREADS"
MOST_THREADS = 1024


def _quota_of(directory: Path) -> float | None:
    """CPUs that a control group grants (version 2, then 1), or None where it sets no limit."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text(encoding="utf-8").split()
            return None if quota == "max" else int(quota) / int(period)
        files = (directory / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        granted, microseconds = (int(file.read_text(encoding="utf-8")) for file in files)
        return None if granted <= 0 else granted / microseconds
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest CPU quota on the way from the process's control group to the root, or None."""
    quotas = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        here = base / path.lstrip("/")
        quotas += [_quota_of(directory) for directory in (here, *here.parents) if directory.is_relative_to(base)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _checked(value: int, source: str) -> int:
    if not 1 <= value <= MOST_THREADS:
        raise ValueError(f"{source}={value} is out of range; use 1 … {MOST_THREADS}")
    return value


def choose_threads(threads: int | None = None) -> int:
    """`threads` where given, else UNDERSTUDY_THREADS, else what affinity and control group allow.

    Raises ValueError for a number outside 1 … 1024.
    """
    if threads is not None:
        return _checked(threads, "threads")
    named = os.environ.get(THREADS_VARIABLE)
    if named:
        if not named.isdecimal():
            raise ValueError(f"{THREADS_VARIABLE}={named!r} is not a number of threads")
        return _checked(int(named), THREADS_VARIABLE)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, min(allowed, MOST_THREADS, allowed if quota is None else math.ceil(quota)))
