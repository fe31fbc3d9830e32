"""Stages, their order, and which of them a run is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.tracking import Tracker


@dataclass(frozen=True)
class BuildContext:
    """What a stage's `build` gets.

    stage: the instance's name, for `tracker.log(context.stage, …)`.
    out: directory to write into; becomes the artifact. A resumable stage may find its earlier files there, or those
        of an artifact that it continues.
    scratch: directory for what only an unfinished build needs, such as checkpoints. A resumable stage may find its
        earlier files there; it is gone when the artifact is there.
    inputs, manifests: role → directory and manifest of the artifact that fills it; read-only.
    progress: `with context.progress(total, "sampling", "tokens") as bar: bar.update(n)`.
    summary: fill with what the stage wants shown and tracked (JSON values). `summary["lines"]`, a list of
        texts, is printed at the end of the run when the stage is the last one.
    """

    stage: str
    out: Path
    scratch: Path
    inputs: dict[str, Path]
    manifests: dict[str, Manifest]
    config: dict[str, Any]
    seed: int
    tracker: Tracker
    progress: Callable[[int, str, str], AbstractContextManager[Progress]]
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the pipeline.

    name: the kind of step; artifacts lie under it and config changes are reported with it.
    instance: unique in a graph; equals `name`, or `name-which` where a step occurs more than once.
    version: raise it when the code's output changes.
    config: plain JSON values: what enters the digest. No paths.
    build: fills `context.out`. Import heavy modules inside (see `lazy`), so that a reused stage stays cheap.
    inputs: role → stage.
    seed: enters the digest too; leave 0 where nothing is random.
    packages: distributions whose version enters the digest; "python" is the interpreter's.
    fingerprint: digests of files outside the store (name → digest); they enter the digest.
    check: cheap validation, called with `config` for every selected stage before any runs; raises ValueError.
    resumable: keep the partial directory of an interrupted build, for `build` to continue in.
    continues: whether an artifact of the first config is the beginning of one of the second, which differs; `build`
        then finds that artifact's files, as if it had been interrupted there. For resumable stages.
    publish: called at the end of every run, whether built or reused, with the artifact's directory and manifest,
        for what lies outside the store (a link to it); returns lines to print.
    """

    name: str
    instance: str
    version: int
    config: dict[str, Any]
    build: Callable[[BuildContext], None]
    inputs: dict[str, Stage] = field(default_factory=dict)
    seed: int = 0
    packages: tuple[str, ...] = ()
    fingerprint: Callable[[], dict[str, str]] | None = None
    check: Callable[[dict[str, Any]], None] | None = None
    resumable: bool = False
    continues: Callable[[dict[str, Any], dict[str, Any]], bool] | None = None
    publish: Callable[[Path, Manifest], list[str]] | None = None


@dataclass(frozen=True)
class Selection:
    """What the command line asks for: names of instances; a step's name where no instance is called so, for all of it.

    stage: only these, and whatever of their inputs is not there yet. Empty: all.
    from_stage: rebuild this one and everything that depends on it.
    force: rebuild these.
    """

    stage: tuple[str, ...] = ()
    from_stage: str | None = None
    force: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, and the instances that are rebuilt even if they exist."""

    stages: tuple[Stage, ...]
    forced: frozenset[str]


def lazy(target: str) -> Callable[..., Any]:
    """A callable that imports `target` ("package.module:function") when it is first called."""
    module, _, function = target.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


def order_stages(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages and all their inputs, each after its inputs, otherwise as given.

    Raises ValueError when two different stages share an instance name.
    """
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        known = ordered.get(stage.instance)
        if known is stage:
            return
        for source in stage.inputs.values():
            visit(source)
        if known is not None:
            raise ValueError(f"two stages are called {stage.instance}; give each its own instance name")
        ordered[stage.instance] = stage

    for stage in stages:
        visit(stage)
    return tuple(ordered.values())


def make_plan(stages: Iterable[Stage], selection: Selection) -> Plan:
    """Which stages run and which are rebuilt.

    Raises ValueError for a name that no stage has, listing those that exist, and for a forced stage that the
    selection leaves out.
    """
    ordered = order_stages(stages)
    chosen = order_stages(_named(ordered, "stage", selection.stage)) if selection.stage else ordered
    forced = {stage.instance for stage in _named(ordered, "force", selection.force)}
    if selection.from_stage is not None:
        first = _named(ordered, "from_stage", (selection.from_stage,))
        forced |= {stage.instance for stage in first}
    left_out = forced - {stage.instance for stage in chosen}
    if left_out:
        key = "force" if selection.force else "from_stage"
        wanted = ", ".join(selection.stage)
        raise ValueError(f"{key} names {', '.join(sorted(left_out))}, which stage={wanted} leaves out; name it in both")
    if selection.from_stage is not None:
        forced |= _with_dependents(ordered, first)
    in_order = tuple(stage for stage in ordered if stage in chosen)
    return Plan(in_order, frozenset(forced & {stage.instance for stage in chosen}))


def _named(stages: Sequence[Stage], key: str, names: Sequence[str]) -> list[Stage]:
    found = []
    for name in names:
        exact = [stage for stage in stages if stage.instance == name]
        matching = exact or [stage for stage in stages if stage.name == name]
        if not matching:
            valid = dict.fromkeys(stage.instance for stage in stages)
            raise ValueError(f"{key}={name}: no such stage; choose from {', '.join(valid)}")
        found += matching
    return found


def _with_dependents(stages: Sequence[Stage], first: Iterable[Stage]) -> set[str]:
    """Instances of `first` and of every stage that depends on one of them; `stages` in order."""
    reached = {stage.instance for stage in first}
    for stage in stages:
        if any(source.instance in reached for source in stage.inputs.values()):
            reached.add(stage.instance)
    return reached
