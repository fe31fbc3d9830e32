"""A small graph to run and to kill: `python killable_graph.py STORE [FORCED …]`, run by test_kill.py.

Every build appends a line to `<store>.log`. The `train` stage is resumable: it counts in steps, each of which it
does at most once over all its attempts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.graph import BuildContext, Selection, Stage
from pipeline.run import run_pipeline
from pipeline.store import Store
from pipeline.tracking import Trackers

STORE = Path(sys.argv[1])
LOG = STORE.with_suffix(".log")
NUM_STEPS = 6
STEP_SECONDS = 0.02


def note(line: str) -> None:
    with LOG.open("a") as stream:
        stream.write(line + "\n")


def write_files(context: BuildContext) -> None:
    parts = [(path / "0.txt").read_text() for path in context.inputs.values()]
    for index in range(4):
        (context.out / f"{index}.txt").write_text(f"{context.stage} {index} {parts}")
        time.sleep(STEP_SECONDS)
    note(f"built {context.stage}")


def train(context: BuildContext) -> None:
    for step in range(NUM_STEPS):
        path = context.out / f"{step}.txt"
        if path.exists():
            continue
        time.sleep(STEP_SECONDS)
        note(f"step {step}")
        partial = path.with_suffix(".new")
        partial.write_text(f"{context.stage} {step}")
        partial.rename(path)
    note(f"built {context.stage}")


def graph() -> list[Stage]:
    target = Stage("target", "target", 1, {"size": 1}, write_files)
    quantize = Stage("quantize", "quantize", 1, {"bits": 4}, write_files, {"target": target})
    drafter = Stage("train", "train", 1, {"steps": NUM_STEPS}, train, {"quantize": quantize}, resumable=True)
    return [target, quantize, drafter, Stage("export", "export", 1, {}, write_files, {"train": drafter})]


if __name__ == "__main__":
    run_pipeline(graph(), Store(STORE), Trackers([]), print, Selection(force=tuple(sys.argv[2:])))
