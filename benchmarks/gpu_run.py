"""What the parts of benchmarks.gpu share: the device, the time they may take, and how one number is taken."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from deploy.runtime.machine import describe_machine

_WARMUP = 2


@dataclass
class Run:
    """is_tiny: tiny shapes in Triton's interpreter, to prove the script; times then say nothing about a GPU.

    deadline: of the current part, on time.monotonic's clock.
    """

    device: torch.device
    is_tiny: bool
    deadline: float = float("inf")

    @property
    def is_late(self) -> bool:
        """A part that is late leaves the rest of its measurements out, and says which."""
        return time.monotonic() > self.deadline

    @property
    def cache_bytes(self) -> int:
        """Of the device's last cache: weights that fit must not be measured from there."""
        return 1 if self.is_tiny else torch.cuda.get_device_properties(self.device).L2_cache_size


def time_ms(run: Run, calls: Sequence[Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median and minimum over `repeats` passes of the time of one of `calls`, in milliseconds.

    On a GPU the pass is one CUDA graph, as the backend runs its forwards, so that launches cost what they cost there.
    """
    if run.device.type != "cuda":
        return _host_ms(calls, repeats)
    for _ in range(_WARMUP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for _ in range(_WARMUP):
        graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) / len(calls) for begin, end in events]
    return {"median": statistics.median(times), "min": min(times)}


def _host_ms(calls: Sequence[Callable[[], object]], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) * 1e3 / len(calls))
    return {"median": statistics.median(times), "min": min(times)}


def _nvidia_smi(fields: str) -> dict[str, str]:
    """What the driver's tool says of the first GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in said.split(",")), strict=False))


def describe_gpu(run: Run) -> dict[str, Any]:
    """The machine, its GPU (None in the interpreter), the versions that made the kernels, and when."""
    described = describe_machine(None) | {
        "kernel": platform.release(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpu": None,
    }
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        described["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        } | _nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    return described
