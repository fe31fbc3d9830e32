"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Protocol


def cpu_field(key: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


class NativeRuntime(Protocol):
    """What is told of the native library: the instruction set and the number of threads that it uses."""

    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...


def describe_machine(runtime: NativeRuntime | None) -> dict[str, Any]:
    """Processor, cores, how the native runtime (None: not in use) uses them, how busy the machine is otherwise."""
    return {
        "cpu": cpu_field("model name") or platform.processor(),
        "family_model": f"{cpu_field('cpu family')}/{cpu_field('model')}",
        "cores": os.cpu_count(),
        "isa": runtime.isa if runtime else None,
        "threads": runtime.threads if runtime else None,
        "load_average": round(os.getloadavg()[0], 2),
    }


def describe_device(model: object) -> dict[str, Any]:
    """What decides how long a model's forwards take: the machine as above, but for how busy it is; and the GPU of a
    model on one."""
    described = describe_machine(getattr(model, "runtime", None))
    del described["load_average"]
    return described | {"backend": type(model).__name__} | getattr(model, "device_facts", {})
