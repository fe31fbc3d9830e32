"""What forwards of one row take after something else: how long the machine needs to be as fast again.

    python -m benchmarks.settling BUNDLE [--milliseconds 8] [--rows 2,6,16] [--threads 2] [--json OUT]

Medians, in milliseconds, of the first, second, … forward after a pause (asleep, and busy without touching memory) or
after a forward of more rows, in turns; "nothing" is one forward after the other. Plain decoding does only these, and
speculative rounds have drafts and forwards of more rows between them, so a round's parts may take longer than each does
among its like.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import fingerprint, write_json
from deploy.formats.bundle import Bundle
from deploy.runtime.costs import CONTEXT, SCRATCH, chain_of_rows
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

FORWARDS, REPEATS, TURNS = 8, 10, 5


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Forwards:
    """Forwards of several rows behind one context, nothing of which is kept."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend = backend
        backend.forward(chain_of_rows(0, CONTEXT, backend.shape.vocab_size), logit_rows=[])
        backend.keep(SCRATCH, range(CONTEXT))

    def milliseconds(self, count: int) -> float:
        rows = chain_of_rows(CONTEXT, count, self._backend.shape.vocab_size)
        begin = time.perf_counter()
        self._backend.forward_tokens(rows, SamplingParams())
        return (time.perf_counter() - begin) * 1e3


def measure(forwards: Forwards, kinds: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(FORWARDS)] for name in kinds}
    for _ in range(TURNS):
        for name, disturb in kinds.items():
            for _ in range(REPEATS):
                disturb()
                for place in times[name]:
                    place.append(forwards.milliseconds(1))
    return {name: [round(statistics.median(place), 3) for place in places] for name, places in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--milliseconds", type=float, default=8.0, help="of a pause")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[2, 6, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    session = Session.open(Bundle.open(arguments.bundle), threads=arguments.threads)
    assert isinstance(session.backend, CpuBackend)
    forwards, pause = Forwards(session.backend), arguments.milliseconds / 1e3
    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        f"asleep for {arguments.milliseconds:g} ms": lambda: time.sleep(pause),
        f"busy for {arguments.milliseconds:g} ms": lambda: spin(pause),
    }
    kinds |= {f"{count} rows": lambda count=count: forwards.milliseconds(count) for count in arguments.rows}  # type: ignore[misc]
    found = measure(forwards, kinds)
    for name, places in found.items():
        print(f"{name:18}" + "".join(f"{each:7.2f}" for each in places), flush=True)
    machine = fingerprint(session.backend.runtime)
    write_json(arguments.json, {"machine": machine, "bundle": arguments.bundle.name, "milliseconds": found})


if __name__ == "__main__":
    main()
