"""What an artifact says about itself, and what decides its name.

`Key` holds everything that may change an artifact's bytes; its digest names the directory. `Manifest` is
`manifest.json`: the key, plus how the build went and every file's size and sha256.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.formats.digest import sha256_file

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
DIGEST_LENGTH = 20  # hex digits of the sha256 that name an artifact: 80 bits, and paths stay readable


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class InputRef:
    """The artifact that filled a role: instance of its stage, its key digest and its content digest."""

    stage: str
    digest: str
    content: str


@dataclass(frozen=True)
class Key:
    """Everything that may change what a stage writes. No paths, logging or device.

    inputs: role → *content* digest, so a rebuild with the same bytes leaves later stages valid.
    fingerprints: name → digest of a file from outside the store.
    packages: distribution → version.
    """

    stage: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    fingerprints: dict[str, str]
    packages: dict[str, str]

    @property
    def digest(self) -> str:
        """Hex name of the artifact. Raises TypeError when the config holds what JSON cannot."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()[:DIGEST_LENGTH]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Times in seconds (UTC for `built`, ISO 8601), memory and sizes in bytes.

    content: sha256 over the sorted (path, sha256) of all files. summary: what the stage wants shown.
    """

    stage: str
    instance: str
    digest: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, InputRef]
    fingerprints: dict[str, str]
    packages: dict[str, str]
    built: str
    wall_seconds: float
    peak_bytes: int
    files: dict[str, FileEntry]
    content: str
    summary: dict[str, Any]
    format: int = MANIFEST_FORMAT

    @property
    def key(self) -> Key:
        """The key under which this artifact was built."""
        inputs = {role: ref.content for role, ref in self.inputs.items()}
        return Key(self.stage, self.version, self.config, self.seed, inputs, self.fingerprints, self.packages)

    def to_json(self) -> str:
        """Indented JSON, keys sorted. Raises TypeError when the summary holds what JSON cannot."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`. Raises ValueError naming what is wrong with `text`."""
        try:
            fields = json.loads(text)
            if fields["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {fields['format']}, this version reads {MANIFEST_FORMAT}")
            fields["inputs"] = {role: InputRef(**ref) for role, ref in fields["inputs"].items()}
            fields["files"] = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unexpected structure ({error})") from error


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. Raises TypeError on what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def list_files(root: Path) -> dict[str, FileEntry]:
    """Every file under `root` but the manifest, by POSIX path relative to it, hashed.

    Raises ValueError on anything that is neither file nor directory: an artifact is complete by itself.
    """
    entries = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a directory; a stage must write real files")
        if path.is_file() and name != MANIFEST_NAME:
            entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    return entries


def content_digest(files: dict[str, FileEntry]) -> str:
    """sha256 (hex) over the sorted (path, sha256) pairs."""
    pairs = sorted((name, entry.sha256) for name, entry in files.items())
    return hashlib.sha256(canonical_json(pairs).encode()).hexdigest()
