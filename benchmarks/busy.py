"""What a busy neighbour costs: decoding with two threads while another process takes one of two cores.

    python -m benchmarks.busy BUNDLE [--seconds 3] [--rounds 5] [--json OUT]

In turn: one thread and all threads on idle cores, all threads while one core is taken. A pool that spins at its
barriers would fall far below one thread; this measures by how much ours does or does not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.forward import fill
from benchmarks.machine import fingerprint, write_json
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.cpu.threads import choose_threads
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams

_CONTEXT = 128


def occupy(core: int) -> None:
    """Takes one core for good."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def decode_rate(backend: CpuBackend, seconds: float) -> float:
    """Tokens per second of greedy decoding behind a short context."""
    fill(backend, _CONTEXT)
    token, count, begin = 100, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        token = backend.forward_tokens([Row(token, _CONTEXT + count)], SamplingParams()).tokens[0]
        backend.keep(0, [0])
        count += 1
    return count / (time.perf_counter() - begin)


def measure(path: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Rates by case, one entry a round."""
    cores = sorted(os.sched_getaffinity(0))
    backends = {threads: CpuBackend(ModelDirectory.open(path), threads=threads) for threads in (1, choose_threads())}
    most = max(backends)
    rates: dict[str, list[float]] = {"one thread": [], f"{most} threads": [], f"{most} threads, a core taken": []}
    for _ in range(rounds):
        rates["one thread"].append(decode_rate(backends[1], seconds))
        rates[f"{most} threads"].append(decode_rate(backends[most], seconds))
        neighbour = multiprocessing.get_context("spawn").Process(target=occupy, args=(cores[-1],), daemon=True)
        neighbour.start()
        time.sleep(1.0)  # until it runs
        rates[f"{most} threads, a core taken"].append(decode_rate(backends[most], seconds))
        neighbour.kill()
        neighbour.join()
    return {"machine": fingerprint(backends[most].runtime), "tok_s": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle, or a model directory")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path = arguments.bundle / "target" if (arguments.bundle / "target").is_dir() else arguments.bundle
    result = measure(path, arguments.seconds, arguments.rounds)
    alone = result["tok_s"]["one thread"]
    for name, rates in result["tok_s"].items():
        ratio = statistics.median(rate / one for rate, one in zip(rates, alone, strict=True))
        print(f"{name:28}{statistics.median(rates):8.0f} tok/s   {ratio:.2f}× one thread (by rounds)")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
