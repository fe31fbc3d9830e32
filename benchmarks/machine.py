"""What a measurement was made on, and how one number is taken."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.formats.unfinished import unfinished
from deploy.kernels.cpu.library import Runtime
from deploy.runtime.machine import describe_machine


def fingerprint(runtime: Runtime) -> dict[str, Any]:
    """Processor, cores, threads used, how busy the machine is with other things, and when."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return describe_machine(runtime) | {"kernel": platform.release(), "time": now}


def time_ms(run: Callable[[], object], repeats: int, *, warmup: int = 2) -> dict[str, float]:
    """Median and minimum of `repeats` calls, in milliseconds."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return {"median": statistics.median(times), "min": min(times)}


def resident_mb() -> float | None:
    """Physical memory of this process, in units of 10^6 bytes; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, ValueError):
        return None


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result where a path was given; a half-written file never has its name."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = unfinished(path)
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
