"""Documents for calibration and held-out measurement, and the split between them.

The default needs nothing but Python itself: the language reference (`pydoc_data.topics`) is prose, the standard
library's sources are code. A file or a data set can take their place.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from compress.calibration.samples import Sample

SECTION_CHARACTERS = 4000
"""A plain text file has no document boundaries; it is cut into sections of about this length, at blank lines."""
MIN_SAMPLE_TOKENS = 64
DOCUMENTS_PER_SAMPLE = 4
"""Samples are spread over so many times as many documents, and over more where these are too short."""


@dataclass(frozen=True)
class Document:
    """A text with a name that is stable between runs (the split hangs on it)."""

    name: str
    text: str


def _named(text: str) -> Document:
    """A document named by its content alone: others, and the file's name, do not move it across the split.

    Copies have one name, so that they stay on one side, in whichever files they stand.
    """
    return Document(f"text/{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)


def python_documents() -> dict[str, list[Document]]:
    """Python's own texts: {"prose": topics of the language reference, "code": the standard library's modules}."""
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    code = [
        Document(f"lib/{file.name}", file.read_text(encoding="utf-8", errors="replace"))
        for file in sorted(library.glob("*.py"))
    ]
    return {"prose": [Document(f"topics/{name}", text) for name, text in sorted(topics.items())], "code": code}


def file_format(path: Path) -> Literal["jsonl", "text"]:
    """How `file_documents` reads the file, by its name's suffix."""
    return "jsonl" if path.suffix == ".jsonl" else "text"


def file_documents(path: Path, key: str = "calibrate.text.path") -> list[Document]:
    """The documents of a .jsonl file (a "text", "prompt" or "turns" in each line) or of a plain text file.

    A line is a document, so that one more line moves no other. A plain text is cut into sections, each beginning where
    the one before ends: a paragraph more or less changes all sections behind it.

    key: under which the user named it. Raises ValueError naming the file, and the line where one is malformed, when it
    is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path} is not a file; name a .txt or .jsonl file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} is not UTF-8 (byte {error.start}); convert it") from error
    documents = _json_lines(path, content, key) if file_format(path) == "jsonl" else _sections(content)
    if not documents:
        raise ValueError(f"{key}={path} is empty; give at least a few documents")
    return documents


def dataset_documents(name: str, split: str, column: str, key: str = "calibrate.text") -> list[Document]:
    """The documents of a data set (hub id or local directory) by `datasets`; rows without a value are passed over.

    Raises ValueError on a missing column, and on a value that is no text, with its row (from 0).
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}.dataset={name} (split {split}) could not be loaded: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"{key}.column={column} is not in {name}; columns: {', '.join(rows.column_names)}")
    documents = []
    for number, text in enumerate(rows[column]):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{key}.column={column}: row {number} of {name} holds a value of type {type(text).__name__}; name a"
                " column of texts"
            )
        if text and text.strip():
            documents.append(_named(text))
    return documents


def split_documents(
    documents: Iterable[Document], *, heldout_share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(calibration, held-out) by a hash of each document's name, so that adding one never moves another."""
    calibration: list[Document] = []
    heldout: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(f"{seed}/{document.name}".encode()).digest()
        is_heldout = int.from_bytes(digest[:4], "little") < heldout_share * 2**32
        (heldout if is_heldout else calibration).append(document)
    return calibration, heldout


_REMEDIES = {
    "calibration": "lower calibrate.text.num_samples or give more text",
    "heldout": "lower calibrate.text.num_heldout, raise calibrate.text.heldout_share or give more text",
}


def windows(
    documents: list[Document],
    tokenize: Callable[[str], list[int]],
    *,
    group: str,
    split: str,
    num_samples: int,
    sequence_length: int,
    rng: np.random.Generator,
) -> list[Sample]:
    """`num_samples` windows of up to `sequence_length` tokens, spread over the documents before any repeats.

    tokenize: text → list of ids. Documents under 64 tokens are passed over. Raises ValueError when the documents
    hold fewer tokens than asked for.
    """
    tokens, starts = _windows_of(documents, tokenize, num_samples, sequence_length, rng)
    samples: list[Sample] = []
    while starts and len(samples) < num_samples:
        for index in list(starts):
            begin = starts[index].pop()
            window = tokens[index][begin : begin + sequence_length]
            samples.append(Sample(group, split, documents[index].name, tuple(window)))
            if not starts[index]:
                del starts[index]
            if len(samples) == num_samples:
                break
    if len(samples) < num_samples:
        raise ValueError(
            f"calibrate: the {group} documents give {len(samples)} {split} samples of {sequence_length} tokens,"
            f" {num_samples} are asked for; {_REMEDIES[split]}"
        )
    return samples


def _windows_of(
    documents: list[Document],
    tokenize: Callable[[str], list[int]],
    num_samples: int,
    sequence_length: int,
    rng: np.random.Generator,
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Token ids of some documents in random order, and where their windows begin, shuffled; both by index.

    More documents are tokenized only until they hold `num_samples` windows.
    """
    tokens: dict[int, list[int]] = {}
    starts: dict[int, list[int]] = {}
    num_windows = 0
    for place, index in enumerate(rng.permutation(len(documents)).tolist()):
        if place >= DOCUMENTS_PER_SAMPLE * num_samples and num_windows >= num_samples:
            break
        ids = tokenize(documents[index].text)
        if len(ids) < MIN_SAMPLE_TOKENS:
            continue
        offsets = np.arange(0, max(len(ids) - sequence_length, 0) + 1, sequence_length)
        tokens[index], starts[index] = ids, rng.permutation(offsets).tolist()
        num_windows += len(offsets)
    return tokens, starts


def _json_lines(path: Path, content: str, key: str) -> list[Document]:
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key}={path}, line {number}: not JSON ({error})") from error
        text = _text_of(record)
        if text is None:
            raise ValueError(f'{key}={path}, line {number}: needs a "text" or "prompt" string or a list of "turns"')
        if text.strip():
            documents.append(_named(text))
    return documents


def _text_of(record: object) -> str | None:
    if not isinstance(record, dict):
        return None
    for key in ("text", "prompt"):
        if isinstance(record.get(key), str):
            return record[key]
    turns = record.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return "\n\n".join(turns)
    return None


def _sections(content: str) -> list[Document]:
    sections, current, size = [], [], 0
    for paragraph in content.split("\n\n"):
        if not paragraph.strip():
            continue
        current.append(paragraph)
        size += len(paragraph)
        if size >= SECTION_CHARACTERS:
            sections.append("\n\n".join(current))
            current, size = [], 0
    if current:
        sections.append("\n\n".join(current))
    return [_named(section) for section in sections]
