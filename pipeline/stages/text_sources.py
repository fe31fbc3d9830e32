"""Texts that a stage reads from outside the store, a file or a data set: what of them enters the stage's key.

A file, or a data set in a local directory, enters by its content and never by its place. A data set of the hub enters
by its id, split and column: what the id stands for may change there without any key saying so.

A configuration of texts has `path` and `dataset`; its source says which of them is read, "file" or "dataset", or is
another word where neither is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.formats.digest import sha256_file


def keyed(text: dict[str, Any], source: str) -> dict[str, Any]:
    """`text` without the places of its texts."""
    left_out = {"path", "dataset"} if _is_directory(text, source) else {"path"}
    return {key: value for key, value in text.items() if key not in left_out}


def keyed_documents(text: dict[str, Any]) -> dict[str, Any]:
    """The same of texts that are cut into documents (compress/calibration/texts.py), with how a file is read.

    text: has `source` as well.
    """
    found = keyed(text, text["source"])
    if text["source"] == "file" and text["path"]:
        from compress.calibration.texts import file_format

        found["format"] = file_format(Path(text["path"]))
    return found


def fingerprint(text: dict[str, Any], source: str, key: str) -> dict[str, str]:
    """sha256 of the file, or of each file in the data set's directory but hidden ones, which `datasets` ignores.

    Empty where there is none on this machine. key: of the configuration.
    """
    if source == "file" and text["path"] and Path(text["path"]).is_file():  # otherwise `check` says what is wrong
        return {f"{key}.path": sha256_file(Path(text["path"]))}
    if not _is_directory(text, source):
        return {}
    root = Path(text["dataset"])
    names = [file.relative_to(root) for file in sorted(root.rglob("*")) if file.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return {f"{key}.dataset/{name.as_posix()}": sha256_file(root / name) for name in shown}


def packages(source: str) -> tuple[str, ...]:
    """Distributions that read the texts."""
    return ("datasets",) if source == "dataset" else ()


def check_documents(text: dict[str, Any], key: str) -> None:
    """Raises ValueError when texts that are cut into documents are not named, others than those that are read are, or
    a file cannot be read.

    text: has `source` as well. key: of the configuration.
    """
    source = text["source"]
    for place, reading in (("path", "file"), ("dataset", "dataset")):
        if source == reading and not text[place]:
            raise ValueError(f"{key}.source={source} needs {key}.{place}")
        if source != reading and text[place]:
            raise ValueError(
                f"{key}.{place}={text[place]} is not read where {key}.source={source}; set {key}.source={reading}"
            )
    if source == "file":
        from compress.calibration.texts import file_documents

        file_documents(Path(text["path"]), f"{key}.path")


def _is_directory(text: dict[str, Any], source: str) -> bool:
    """Whether a data set is read that lies in a local directory."""
    return source == "dataset" and bool(text["dataset"]) and Path(text["dataset"]).is_dir()
