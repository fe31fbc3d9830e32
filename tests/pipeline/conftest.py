"""Small stages that write text, and a tracker that remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.graph import BuildContext, Selection, Stage
from pipeline.run import Outcome, run_pipeline
from pipeline.store import Store


@dataclass
class Recorder:
    """A tracker that keeps its calls."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def start_run(self, config: dict[str, Any]) -> None:
        self.calls.append(("start_run", config))

    def log(self, stage: str, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("log", stage, metrics, step))

    def summary(self, stage: str, values: dict[str, Any]) -> None:
        self.calls.append(("summary", stage, values))

    def artifact(self, stage: str, instance: str, path: Path, digest: str, inputs: dict[str, str]) -> None:
        self.calls.append(("artifact", stage, instance, path, digest, inputs))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


@dataclass
class Bench:
    """A store with what happened in it: which stages were built, which lines were reported."""

    store: Store
    tracker: Recorder = field(default_factory=Recorder)
    built: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def stage(self, instance: str, *inputs: Stage, text: str = "", **fields: Any) -> Stage:
        """A stage whose output is its own name and text followed by its inputs' outputs."""

        def build(context: BuildContext) -> None:
            self.built.append(instance)
            parts = [context.config["text"], *((path / "out.txt").read_text() for path in context.inputs.values())]
            (context.out / "out.txt").write_text(instance + "(" + " ".join(parts) + ")")

        defaults: dict[str, Any] = {"name": instance.partition("-")[0], "version": 1, "config": {"text": text}}
        sources = {source.name: source for source in inputs}
        return Stage(**{**defaults, "instance": instance, "build": build, "inputs": sources, **fields})

    def chain(self, **texts: str) -> list[Stage]:
        """target → calibrate → quantize (which reads both) → export."""
        target = self.stage("target", text=texts.get("target", "t"))
        calibrate = self.stage("calibrate", target, text=texts.get("calibrate", "c"))
        quantize = self.stage("quantize", target, calibrate, text=texts.get("quantize", "q"))
        return [target, calibrate, quantize, self.stage("export", quantize, text=texts.get("export", "e"))]

    def run(self, stages: list[Stage], **selection: Any) -> list[Outcome]:
        """Run and forget the earlier runs' records."""
        self.built.clear()
        self.lines.clear()
        return run_pipeline(stages, self.store, self.tracker, self.lines.append, Selection(**selection))

    def line(self, instance: str, word: str) -> str:
        """The one reported line of `instance` that contains `word`."""
        found = [line for line in self.lines if line.split()[0] == instance and word in line]
        assert len(found) == 1, self.lines
        return found[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Store(tmp_path / "artifacts"))


@pytest.fixture
def new_bench() -> Callable[[Path], Bench]:
    return lambda root: Bench(Store(root))
