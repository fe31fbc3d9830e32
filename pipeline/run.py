"""The loop over stages: reuse what is there, build what is not, say why."""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pipeline.errors import StoreError, is_disk_full
from pipeline.graph import BuildContext, Plan, Selection, Stage, make_plan
from pipeline.manifest import InputRef, Key, Manifest, content_digest, list_files
from pipeline.memory import MemoryWatch
from pipeline.progress import format_seconds, show_progress
from pipeline.reasons import why_missing
from pipeline.store import Artifact, Damage, Store
from pipeline.tracking import Tracker

GIB = 1 << 30
LABEL_WIDTH = 22

Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one stage: its artifact, whether it was built now, and why."""

    stage: Stage
    artifact: Artifact
    was_built: bool
    reason: str


def run_pipeline(
    stages: Iterable[Stage], store: Store, tracker: Tracker, report: Report, selection: Selection | None = None
) -> list[Outcome]:
    """Bring every selected stage up to date, in order; `report` gets the lines for the user.

    Raises ValueError (StoreError for the store) before any work when the selection, a stage's config or the
    store is unusable; whatever a stage's build raises, with every earlier stage kept.
    """
    plan = make_plan(stages, selection or Selection())
    for stage in plan.stages:
        if stage.check is not None:
            stage.check(stage.config)
    store.prepare()
    return _Run(store, tracker, report, plan).all()


def closing_lines(outcomes: list[Outcome]) -> list[str]:
    """What to print last: the summary lines of the last stage, then what each stage publishes."""
    lines = list(outcomes[-1].artifact.manifest.summary.get("lines", [])) if outcomes else []
    for outcome in outcomes:
        if outcome.stage.publish is not None:
            lines += outcome.stage.publish(outcome.artifact.path, outcome.artifact.manifest)
    return lines


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed version of each distribution, without importing any; "python" is the interpreter.

    Raises ValueError naming a distribution that is not installed.
    """
    versions = {}
    for name in names:
        try:
            versions[name] = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"package {name} is not installed; `make install` installs everything") from error
    return versions


class _Run:
    """One pass over a plan; remembers the artifact of every stage it has passed."""

    def __init__(self, store: Store, tracker: Tracker, report: Report, plan: Plan) -> None:
        self.store, self.tracker, self.report, self.plan = store, tracker, report, plan
        self.done: dict[str, Outcome] = {}
        self.built_here: set[str] = set()

    def all(self) -> list[Outcome]:
        for stage in self.plan.stages:
            outcome = self._resolve(stage)
            self.done[stage.instance] = outcome
            self._track(outcome)
        return list(self.done.values())

    def _resolve(self, stage: Stage) -> Outcome:
        key = self._key(stage)
        is_forced = stage.instance in self.plan.forced
        if not is_forced and isinstance(found := self.store.find(stage.name, key.digest), Artifact):
            return self._reuse(stage, found)
        with self._explained(), self.store.building(stage.name, key.digest, self._announce(stage)):
            found = self.store.find(stage.name, key.digest)
            if isinstance(found, Artifact) and (not is_forced or key.digest in self.built_here):
                return self._reuse(stage, found)
            reason = self._why(stage, key, found)
            self._say(stage, f"building: {reason}")
            artifact = self._build(stage, key, is_forced=is_forced)
        self.built_here.add(key.digest)
        manifest = artifact.manifest
        cost = f"in {format_seconds(manifest.wall_seconds)}, peak memory {manifest.peak_bytes / GIB:.2f} GiB"
        self._say(stage, f"built {cost} → {artifact.path}")
        return Outcome(stage, artifact, was_built=True, reason=reason)

    def _key(self, stage: Stage) -> Key:
        inputs = {role: self._input(source).manifest.content for role, source in stage.inputs.items()}
        fingerprints = stage.fingerprint() if stage.fingerprint is not None else {}
        packages = package_versions(stage.packages)
        return Key(stage.name, stage.version, stage.config, stage.seed, inputs, fingerprints, packages)

    def _input(self, source: Stage) -> Artifact:
        return self.done[source.instance].artifact

    def _reuse(self, stage: Stage, found: Artifact) -> Outcome:
        built = datetime.fromisoformat(found.manifest.built).astimezone().strftime("%Y-%m-%d %H:%M")
        cost = f"built {built} in {format_seconds(found.manifest.wall_seconds)}"
        reason = f"config, inputs, code and packages unchanged; {cost}"
        self._say(stage, f"reused: {reason}")
        return Outcome(stage, found, was_built=False, reason=reason)

    def _why(self, stage: Stage, key: Key, found: Artifact | Damage | None) -> str:
        if isinstance(found, Damage):
            return f"damaged: {found.problem}"
        if found is not None:
            return "forced"
        roles = {role: source.instance for role, source in stage.inputs.items()}
        return why_missing(key, self.store.history(stage.name, stage.instance), roles)

    def _build(self, stage: Stage, key: Key, *, is_forced: bool) -> Artifact:
        out = self.store.partial(stage.name, key.digest, keep=stage.resumable, is_forced=is_forced)
        scratch = self.store.scratch(stage.name, key.digest)
        if any(out.iterdir()) or any(scratch.iterdir()):
            self._say(stage, "goes on where an earlier build was interrupted")
        elif not is_forced:
            self._continue_artifact(stage, key, out)
        context = self._context(stage, out, scratch)
        start = time.monotonic()
        try:
            with ExitStack() as reading, MemoryWatch() as memory:
                for source in stage.inputs.values():
                    reading.enter_context(self.store.using(self._input(source), self._announce(stage)))
                stage.build(context)
            return self.store.publish(
                self._manifest(stage, key, context, time.monotonic() - start, memory.peak_bytes), self._announce(stage)
            )
        except BaseException:
            if not stage.resumable:
                self.store.discard_partial(stage.name, key.digest)
            raise

    def _continue_artifact(self, stage: Stage, key: Key, out: Path) -> None:
        """Put into `out` the files of the largest artifact that is the beginning of this one, if there is any."""
        if stage.continues is None:
            return
        found = [
            manifest
            for manifest in self.store.history(stage.name, stage.instance)
            if replace(manifest.key, config=key.config) == key and stage.continues(manifest.config, key.config)
        ]
        for manifest in sorted(found, key=lambda each: sum(entry.size for entry in each.files.values()), reverse=True):
            if (artifact := self.store.copy(manifest, out, self._announce(stage))) is not None:
                self._say(stage, f"continues {artifact.path}")
                return

    def _context(self, stage: Stage, out: Path, scratch: Path) -> BuildContext:
        artifacts = {role: self._input(source) for role, source in stage.inputs.items()}
        return BuildContext(
            stage=stage.instance,
            out=out,
            scratch=scratch,
            inputs={role: artifact.path for role, artifact in artifacts.items()},
            manifests={role: artifact.manifest for role, artifact in artifacts.items()},
            config=stage.config,
            seed=stage.seed,
            tracker=self.tracker,
            progress=show_progress,
        )

    def _manifest(self, stage: Stage, key: Key, context: BuildContext, seconds: float, peak_bytes: int) -> Manifest:
        refs = {}
        for role, source in stage.inputs.items():
            used = self._input(source).manifest
            refs[role] = InputRef(source.instance, used.digest, used.content)
        files = list_files(context.out)
        return Manifest(
            stage=stage.name,
            instance=stage.instance,
            digest=key.digest,
            version=stage.version,
            config=stage.config,
            seed=stage.seed,
            inputs=refs,
            fingerprints=key.fingerprints,
            packages=key.packages,
            built=datetime.now(UTC).isoformat(timespec="milliseconds"),
            wall_seconds=round(seconds, 3),
            peak_bytes=peak_bytes,
            files=files,
            content=content_digest(files),
            summary=context.summary,
        )

    def _track(self, outcome: Outcome) -> None:
        manifest = outcome.artifact.manifest
        inputs = {role: ref.digest for role, ref in manifest.inputs.items()}
        self.tracker.summary(outcome.stage.instance, manifest.summary)
        self.tracker.artifact(
            outcome.stage.name, outcome.stage.instance, outcome.artifact.path, manifest.digest, inputs
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A full disk under the store becomes one clear error, whoever noticed it."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise self.store.explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
            raise

    def _announce(self, stage: Stage) -> Report:
        return lambda line: self._say(stage, line)

    def _say(self, stage: Stage, line: str) -> None:
        self.report(f"{stage.instance:<{LABEL_WIDTH}} {line}")
