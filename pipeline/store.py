"""Content-addressed artifacts on disk: `<root>/<stage>/<digest>/`, complete or absent.

An artifact is built in `<digest>.partial`, its manifest written last, then renamed; what only an unfinished build needs
lies in `<digest>.scratch` and goes when the artifact is there. A rebuild moves the old one
to `<digest>.replaced` first; `recover` puts it back when a kill came between the two renames. Whatever the
instant of a kill, a look-up finds the old artifact, the new one or none, never half of one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.formats.digest import sha256_file
from deploy.formats.unfinished import discard_unfinished
from pipeline.errors import StoreError, is_disk_full, is_not_writable
from pipeline.locking import Announce, build_lock, use_lock
from pipeline.manifest import MANIFEST_NAME, Manifest

PARTIAL = ".partial"
SCRATCH = ".scratch"
REPLACED = ".replaced"
COPYING = ".copying"
FORCED = ".forced"
"""Beside a partial directory that a forced build began in: one that is forced again goes on there."""
LOCKS = ".locks"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its directory and its manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Damage:
    """A directory that should be an artifact and is not, and what is wrong with it."""

    path: Path
    problem: str


class Store:
    """The artifacts under one root directory; created by `prepare`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def prepare(self) -> None:
        """Create the root and prove that it can be written. Raises StoreError naming path and remedy."""
        try:
            (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".writable-") as stream:
                stream.write(b"x" * 4096)
                stream.flush()
        except OSError as error:
            raise self.explain(error) from error

    def path(self, stage: str, digest: str) -> Path:
        """Where the artifact lies, whether or not it exists."""
        return self.root / stage / digest

    def find(self, stage: str, digest: str) -> Artifact | Damage | None:
        """The artifact, what is wrong with it, or None. Compares file sizes, not contents."""
        path = self.path(stage, digest)
        if not path.is_dir():
            return None
        try:
            manifest = Manifest.from_json((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Damage(path, f"{MANIFEST_NAME} is missing")
        except ValueError as error:
            return Damage(path, f"{MANIFEST_NAME} cannot be read: {error}")
        if manifest.digest != digest or manifest.key.digest != digest:
            return Damage(path, f"{MANIFEST_NAME} belongs to another artifact ({manifest.digest})")
        problem = _first_wrong_size(path, manifest)
        return Damage(path, problem) if problem else Artifact(path, manifest)

    def history(self, stage: str, instance: str) -> list[Manifest]:
        """Manifests of every readable artifact of this stage and instance."""
        manifests = []
        for path in sorted((self.root / stage).glob(f"*/{MANIFEST_NAME}")):
            if path.parent.suffix:
                continue
            try:
                manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # damaged, or replaced this instant: says nothing about the past
            if manifest.instance == instance:
                manifests.append(manifest)
        return manifests

    @contextmanager
    def building(self, stage: str, digest: str, announce: Announce) -> Iterator[None]:
        """Hold the right to build this artifact; other runs wait. Repairs an interrupted replacement first."""
        (self.root / stage).mkdir(parents=True, exist_ok=True)
        with build_lock(self._lock(stage, digest), f"{stage}/{digest}", announce):
            self._recover(stage, digest, announce)
            yield

    @contextmanager
    def using(self, artifact: Artifact, announce: Announce) -> Iterator[None]:
        """Keep `artifact` from being replaced meanwhile. Raises StoreError when it already was."""
        stage, digest = artifact.manifest.stage, artifact.manifest.digest
        with use_lock(self._lock(stage, digest), f"{stage}/{digest}", announce):
            now = self.find(stage, digest)
            if not isinstance(now, Artifact) or now.manifest.content != artifact.manifest.content:
                raise StoreError(f"{artifact.path} was rebuilt by another run meanwhile; start this run again")
            yield

    def copy(self, manifest: Manifest, directory: Path, announce: Announce) -> Artifact | None:
        """Put an artifact's files into `directory`, which is empty: all of them, or none if it is killed meanwhile.

        None where the artifact is damaged, which is looked at byte by byte, or no longer there.
        """
        with use_lock(self._lock(manifest.stage, manifest.digest), f"{manifest.stage}/{manifest.digest}", announce):
            found = self.find(manifest.stage, manifest.digest)
            if not isinstance(found, Artifact) or verify_artifact(found):
                return None
            copying = _copying(directory)
            try:
                shutil.copytree(found.path, copying, ignore=shutil.ignore_patterns(MANIFEST_NAME))
                for path in copying.rglob("*"):
                    _fsync(path)
                copying.replace(directory)
            finally:
                shutil.rmtree(copying, ignore_errors=True)
            return found

    def partial(self, stage: str, digest: str, *, keep: bool, is_forced: bool = False) -> Path:
        """The directory to build in; it and `scratch` are emptied first unless `keep`. Call only while `building`.

        is_forced: only what a forced build left is kept.
        """
        path, scratch = self.path(stage, digest).with_name(digest + PARTIAL), self.scratch(stage, digest)
        shutil.rmtree(_copying(path), ignore_errors=True)  # of a run that was killed
        forced = path.with_suffix(FORCED)
        if not (keep and (forced.exists() or not is_forced)):
            self.discard_partial(stage, digest)
        if is_forced:
            forced.touch()
        for directory in (path, scratch):
            directory.mkdir(exist_ok=True)
            discard_unfinished(directory)
        return path

    def scratch(self, stage: str, digest: str) -> Path:
        """Beside the directory to build in, one for what is no part of the artifact."""
        return self.path(stage, digest).with_name(digest + SCRATCH)

    def discard_partial(self, stage: str, digest: str) -> None:
        """Remove what a failed build left, if anything."""
        for directory in (self.path(stage, digest).with_name(digest + PARTIAL), self.scratch(stage, digest)):
            if directory.exists():
                shutil.rmtree(directory)

    def publish(self, manifest: Manifest, announce: Announce) -> Artifact:
        """Write the manifest into the partial directory and make it the artifact.

        Everything is on disk before the name appears. Call only while `building`.
        """
        final = self.path(manifest.stage, manifest.digest)
        partial = final.with_name(final.name + PARTIAL)
        replaced = final.with_name(final.name + REPLACED)
        for name in manifest.files:
            _fsync(partial / name)
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        _fsync(partial / MANIFEST_NAME)
        for directory in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
            _fsync(directory)
        what = f"{manifest.stage}/{manifest.digest}"
        with use_lock(self._lock(manifest.stage, manifest.digest), what, announce, exclusive=True):
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            partial.with_suffix(FORCED).unlink(missing_ok=True)
            _fsync(final.parent)
        for leftover in (replaced, self.scratch(manifest.stage, manifest.digest)):
            shutil.rmtree(leftover, ignore_errors=True)
        return Artifact(final, manifest)

    def explain(self, error: OSError) -> StoreError:
        """`error` as a StoreError that names the store, what happened and what to do."""
        if is_disk_full(error):
            return StoreError(f"store={self.root}: no space left on its disk; free some or set store= to another disk")
        if is_not_writable(error):
            return StoreError(f"store={self.root}: not writable ({error.strerror}); set store= to a writable directory")
        return StoreError(f"store={self.root}: {error.strerror or error}; set store= to a usable directory")

    def _lock(self, stage: str, digest: str) -> Path:
        return self.root / LOCKS / f"{stage}-{digest}"

    def _recover(self, stage: str, digest: str, announce: Announce) -> None:
        """Finish or undo a replacement that a kill interrupted."""
        final = self.path(stage, digest)
        replaced = final.with_name(digest + REPLACED)
        if not replaced.exists():
            return
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
            announce(f"restored {stage}/{digest}: its rebuild was interrupted")


def verify_artifact(artifact: Artifact) -> list[str]:
    """Every file whose bytes differ from the manifest, as readable lines; empty when all is well."""
    problems = []
    for name, entry in artifact.manifest.files.items():
        path = artifact.path / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256_file(path) != entry.sha256:
            problems.append(f"{path} differs from its sha256 in {MANIFEST_NAME}")
    return problems


def _first_wrong_size(path: Path, manifest: Manifest) -> str | None:
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.size:
            return f"{name} has {file.stat().st_size} bytes, not {entry.size}"
    return None


def _copying(directory: Path) -> Path:
    """Where a copy grows that will become `directory`."""
    return directory.with_name(directory.name + COPYING)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
