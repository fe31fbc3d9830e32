"""The bundle: one directory that is complete by itself, described by manifest.json. See docs/bundle-format.md.

`write_manifest` is the last step of making one; `Bundle.open` is how everything else reads one; `verify_bundle` names
every problem instead of the first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.chat import ChatTemplate
from deploy.formats.components import (
    MODEL_ROLES,
    Component,
    component_json,
    describe_components,
    parse_component,
    used_extensions,
)
from deploy.formats.digest import sha256_file
from deploy.formats.draft_vocabulary import read_draft_vocabulary
from deploy.formats.errors import BundleError, FormatError
from deploy.formats.model_dir import ModelDirectory, read_json
from deploy.formats.speculators import EagleDirectory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REQUIRED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "report.html", "README.md")
EXTENSIONS = ("weight_min", "input_flatten")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json, parsed."""

    name: str
    components: tuple[Component, ...]
    files: Mapping[str, FileRecord]
    provenance: Mapping[str, Any]
    licence: str
    quality: tuple[Mapping[str, Any], ...]
    extensions: tuple[str, ...]
    chat_template: str


def _walk(directory: Path) -> Iterator[Path]:
    """Every file below `directory`, links included, sorted."""
    yield from sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def _hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in _walk(directory):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST:
            continue
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path}: a bundle holds plain files only; copy the file in place of the link")
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def write_manifest(
    directory: str | Path,
    *,
    name: str,
    components: Mapping[str, str],
    provenance: Mapping[str, Any],
    licence: str,
    quality: Sequence[Mapping[str, Any]] = (),
    extensions: Sequence[str] = (),
) -> Manifest:
    """Describe and hash everything in `directory` and write its manifest.json: last, and atomically.

    components: role → path relative to the bundle, e.g. {"target": "target"}; each is opened and thereby checked.
    provenance: JSON of the caller's choosing (source, its precision, method, calibration, digests, versions).
    licence: the model's, e.g. "apache-2.0". quality: table rows, column → value. extensions: of `EXTENSIONS`; must
    name every one that a component uses. Raises BundleError or FormatError (both ValueError) before writing anything.
    """
    directory = Path(directory)
    for required in REQUIRED_FILES:
        if not (directory / required).is_file():
            raise BundleError(f"{directory / required}: missing; a bundle needs {', '.join(REQUIRED_FILES)}")
    files = _hash_files(directory)
    digests = {name: record["sha256"] for name, record in files.items()}
    described = [_required(found) for found in describe_components(directory, components, digests)]
    models = [path for role, path in components.items() if role in MODEL_ROLES]
    for extension in sorted(set().union(*(used_extensions(directory, path) for path in models)) - set(extensions)):
        raise BundleError(f"{directory}: a model has {extension} tensors; declare extensions=['{extension}']")
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "components": {item.role: component_json(item) for item in described},
        "chat_template": ChatTemplate(template).identity,
        "licence": licence,
        "extensions": list(extensions),
        "quality": [dict(row) for row in quality],
        "provenance": dict(provenance),
        "files": files,
    }
    manifest = _parse_manifest(directory / MANIFEST, content)
    temporary = directory / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(directory / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def _is_inside(name: str) -> bool:
    """Whether a manifest's path is relative, normal and stays in the bundle."""
    pure = PurePosixPath(name)
    return bool(name) and pure.as_posix() == name and not pure.is_absolute() and ".." not in pure.parts and name != "."


def _parse_files(path: Path, raw: object) -> dict[str, FileRecord]:
    if not isinstance(raw, dict):
        raise BundleError(f"{path}: files is not an object")
    files = {}
    for name, record in raw.items():
        if not _is_inside(name):
            raise BundleError(f"{path}: files lists {name!r}, which is not a plain path inside the bundle")
        if not isinstance(record, dict) or not isinstance(record.get("bytes"), int):
            raise BundleError(f"{path}: files[{name!r}] has no size")
        digest = record.get("sha256")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise BundleError(f"{path}: files[{name!r}] has no sha256")
        files[name] = FileRecord(record["bytes"], digest)
    for required in REQUIRED_FILES:
        if required not in files:
            raise BundleError(f"{path}: files does not list {required}")
    return files


def _parse_manifest(path: Path, raw: Mapping[str, Any]) -> Manifest:
    version = raw.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{path}: format_version={version!r} is not a positive integer; not a bundle's manifest")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version={version} is newer than this program's {FORMAT_VERSION}; update understudy"
        )
    expected = {"name": str, "components": dict, "licence": str, "chat_template": str}
    expected |= {"quality": list, "extensions": list, "provenance": dict}
    for key, kind in expected.items():
        if not isinstance(raw.get(key), kind):
            raise BundleError(f"{path}: {key} is missing or not {'text' if kind is str else f'a {kind.__name__}'}")
    if "target" not in raw["components"]:
        raise BundleError(f"{path}: components has no target")
    for extension in raw["extensions"]:
        if extension not in EXTENSIONS:
            raise BundleError(f"{path}: extension {extension!r} is not known to this version; update understudy")
    if not all(isinstance(row, dict) for row in raw["quality"]):
        raise BundleError(f"{path}: quality is not a list of rows")
    return Manifest(
        name=raw["name"],
        components=_parse_components(path, raw["components"]),
        files=_parse_files(path, raw.get("files")),
        provenance=raw["provenance"],
        licence=raw["licence"],
        quality=tuple(raw["quality"]),
        extensions=tuple(raw["extensions"]),
        chat_template=raw["chat_template"],
    )


def _parse_components(path: Path, raw: Mapping[str, Any]) -> tuple[Component, ...]:
    try:
        components = tuple(parse_component(role, item) for role, item in raw.items())
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    for item in components:
        if not _is_inside(item.path):
            raise BundleError(f"{path}: component {item.role!r} lies at {item.path!r}, outside the bundle")
    return components


def _required(found: Component | ValueError) -> Component:
    if isinstance(found, ValueError):
        raise found
    return found


def _read_manifest(directory: Path) -> Manifest:
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such directory")
    if not (directory / MANIFEST).is_file():
        raise BundleError(f"{directory}: not a bundle: it has no {MANIFEST}")
    try:
        raw = read_json(directory / MANIFEST)
    except FormatError as error:
        raise BundleError(str(error)) from error
    return _parse_manifest(directory / MANIFEST, raw)


def _check_file(directory: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one listed file, or None."""
    path = directory / name
    if path.is_symlink():
        return f"{path}: is a link; a bundle holds plain files only"
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != record.num_bytes:
        return f"{path}: has {size} bytes, the manifest says {record.num_bytes}"
    try:
        digest = sha256_file(path)
    except OSError as error:
        return f"{path}: not readable: {error.strerror}"
    if digest != record.sha256:
        return f"{path}: sha256 is {digest}, the manifest says {record.sha256}; the file was changed"
    return None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every listed file is there, unchanged."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Parse the manifest and check size and sha256 of every file.

        Raises BundleError naming the first problem's file and reason.
        """
        directory = Path(path)
        manifest = _read_manifest(directory)
        for name, record in manifest.files.items():
            problem = _check_file(directory, name, record)
            if problem:
                raise BundleError(problem)
        return cls(directory, manifest)

    def component(self, role: str) -> Component:
        for item in self.manifest.components:
            if item.role == role:
                return item
        raise BundleError(f"{self.path}: has no {role}; it has {', '.join(c.role for c in self.manifest.components)}")

    def model(self, role: str = "target") -> ModelDirectory:
        """Open one of the bundle's models."""
        return ModelDirectory.open(self.path / self.component(role).path)

    def head(self, role: str, above: ModelShape) -> EagleDirectory:
        """Open one of the bundle's EAGLE heads; above: the shape of the model that it drafts for."""
        return EagleDirectory.open(self.path / self.component(role).path, above)

    def draft_ids(self, role: str) -> npt.NDArray[np.int64] | None:
        """The token ids that a language model of the bundle may draft, ascending; None where it may draft all."""
        with self.model(role) as model:
            return read_draft_vocabulary(model.path, model.shape.vocab_size)

    def chat_template(self) -> ChatTemplate:
        """The template, with the special tokens that tokenizer_config.json names."""
        return ChatTemplate.from_directory(self.path)


def _verify_components(directory: Path, manifest: Manifest) -> Iterator[str]:
    paths = {item.role: item.path for item in manifest.components}
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    described = describe_components(directory, paths, digests)
    for item, found in zip(manifest.components, described, strict=True):
        if isinstance(found, ValueError):
            yield str(found)
        elif found != item:
            yield f"{directory / item.path}: is {found}, the manifest says {item}"


def verify_bundle(path: str | Path) -> list[str]:
    """Every problem of the bundle at `path`, one line each; empty when it is sound.

    Beyond `Bundle.open`: files that the manifest does not list, models whose tensors do not fit their configuration,
    a chat template or tokenizer configuration that does not load, and a description that does not match.
    """
    directory = Path(path)
    try:
        manifest = _read_manifest(directory)
    except BundleError as error:
        return [str(error)]
    problems = [_check_file(directory, name, record) for name, record in manifest.files.items()]
    for file in _walk(directory):
        name = file.relative_to(directory).as_posix()
        if name != MANIFEST and name not in manifest.files:
            problems.append(f"{file}: not listed in {MANIFEST}")
    problems += _verify_components(directory, manifest)
    try:
        if Bundle(directory, manifest).chat_template().identity != manifest.chat_template:
            problems.append(f"{directory / 'chat_template.jinja'}: is not the template that the manifest names")
        read_json(directory / "tokenizer.json")
    except (ValueError, OSError) as error:
        problems.append(str(error))
    # A missing file is found by more than one check; say it once.
    return list(dict.fromkeys(problem for problem in problems if problem))
