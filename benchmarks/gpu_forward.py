"""Whole forwards by number of rows, on the shapes of Llama-3-8B and 70B with random 4-bit weights: T(1) … T(64).

Two times of each: `ms` is that of a call as a session makes it (rows in, tokens out on the host), `device_ms` that of
its CUDA graph alone. The difference is what Python and the copies cost. `of_ceiling`: reading all weights once at the
measured rate of mere reading, over `device_ms`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.gpu_models import random_model, shapes_of
from benchmarks.gpu_run import Run
from deploy.runtime.backend import Row
from deploy.runtime.costs import REPEATS, measure_rows
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_inputs import BUCKETS

CONTEXTS, TINY_CONTEXTS = (256, 4096), (4,)
PREFILL, TINY_PREFILL = 512, 6
TINY_ROWS = (1, 2)
_REPEATS = 20


def device_ms(run: Run, model: GpuBackend, num_rows: int) -> float:
    """Median time of the bucket's graph, over the rows that its last call laid out."""
    if run.device.type != "cuda":
        begin = time.perf_counter()
        model.replay(num_rows, (), has_head=True)
        return (time.perf_counter() - begin) * 1e3
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
    for begin_event, end_event in events:
        begin_event.record()
        model.replay(num_rows, (), has_head=True)
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def prefill_ms(run: Run, model: GpuBackend) -> float:
    """Median time of reading so many tokens and choosing what follows."""
    count = TINY_PREFILL if run.is_tiny else PREFILL
    rows = [Row(100 + i, i, 0, i - 1) for i in range(count)]
    times = []
    for _ in range(2 if run.is_tiny else 6):
        begin = time.perf_counter()
        model.forward([Row(row.token, row.position, 0, row.parent) for row in rows], logit_rows=[count - 1])
        times.append((time.perf_counter() - begin) * 1e3)
    model.reset(0)
    return statistics.median(times[1:])


def measure_model(run: Run, model: GpuBackend, read_gb_s: float) -> dict[str, Any]:
    """Context → rows → times; prefill; bytes of weights."""
    rows = TINY_ROWS if run.is_tiny else model.row_counts
    least = model.weight_bytes / read_gb_s / 1e6
    result: dict[str, Any] = {"weight_bytes": model.weight_bytes, "ceiling_ms": least, "contexts": {}}
    for context in TINY_CONTEXTS if run.is_tiny else CONTEXTS:
        if run.is_late:
            break
        by_rows: dict[str, Any] = {}
        for count, milliseconds in measure_rows(
            model, rows, context=context, repeats=1 if run.is_tiny else REPEATS
        ).items():
            by_rows[str(count)] = {"ms": milliseconds}
            if count in BUCKETS:
                found = device_ms(run, model, count)
                by_rows[str(count)] |= {"device_ms": found, "of_ceiling": least / found}
        result["contexts"][str(context)] = by_rows
    result["prefill_ms"] = prefill_ms(run, model)
    return result


def show(name: str, found: dict[str, Any]) -> None:
    for context, by_rows in found["contexts"].items():
        first = by_rows["1"]["ms"]
        for rows, entry in by_rows.items():
            more = f"{entry['device_ms']:10.3f}{entry['of_ceiling']:9.0%}" if "device_ms" in entry else ""
            print(f"{name:5}{context:>8}{rows:>6}{entry['ms']:10.3f}{entry['ms'] / first:8.2f}×{more}", flush=True)
    print(f"{name:5}prefill {found['prefill_ms']:.1f} ms")


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Model → what `measure_model` gives. Needs the ceilings."""
    print(f"{'model':5}{'context':>8}{'rows':>6}{'ms':>10}{'T(1)':>9}{'graph ms':>10}{'of best':>9}")
    models: dict[str, Any] = {}
    for name, shape in shapes_of(run).items():
        model = random_model(run, shape)
        models[name] = measure_model(run, model, found["ceilings"]["read_gb_s"])
        show(name, models[name])
        del model
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"models": models}
