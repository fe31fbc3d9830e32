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

import numpy as np

from compress.calibration.samples import Sample

SECTION_CHARACTERS = 4000
"""A plain text file has no document boundaries; it is cut into sections of about this length, at blank lines."""
MIN_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Document:
    """A text with a name that is stable between runs (the split hangs on it)."""

    name: str
    text: str


def _named(origin: str, text: str) -> Document:
    """A document named by its content: inserting others does not move it across the split, and copies stay together."""
    return Document(f"{origin}/{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)


def python_documents() -> dict[str, list[Document]]:
    """Python's own texts: {"prose": topics of the language reference, "code": the standard library's modules}."""
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    code = [Document(f"lib/{file.name}", file.read_text(errors="replace")) for file in sorted(library.glob("*.py"))]
    return {"prose": [Document(f"topics/{name}", text) for name, text in sorted(topics.items())], "code": code}


def file_documents(path: Path, key: str = "calibrate.text.path") -> list[Document]:
    """The documents of a .jsonl file (a "text", "prompt" or "turns" in each line) or of a plain text file.

    key: under which the user named it. Raises ValueError naming the file, and the line where one is malformed, when it
    is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path} is not a file; name a .txt or .jsonl file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} is not UTF-8 (byte {error.start}); convert it") from error
    documents = _json_lines(path, content, key) if path.suffix == ".jsonl" else _sections(path, content)
    if not documents:
        raise ValueError(f"{key}={path} is empty; give at least a few documents")
    return documents


def dataset_documents(name: str, split: str, column: str, key: str = "calibrate.text") -> list[Document]:
    """The documents of a data set (hub id or local directory) by `datasets`. Raises ValueError on a missing column."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}.dataset={name} (split {split}) could not be loaded: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"{key}.column={column} is not in {name}; columns: {', '.join(rows.column_names)}")
    return [_named(name, text) for text in rows[column] if text.strip()]


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
    order = rng.permutation(len(documents))
    tokens = {int(i): tokenize(documents[i].text) for i in order[: 4 * num_samples]}
    starts: dict[int, list[int]] = {}
    for index, ids in tokens.items():
        if len(ids) >= MIN_SAMPLE_TOKENS:
            offsets = np.arange(0, max(len(ids) - sequence_length, 0) + 1, sequence_length)
            starts[index] = [int(offset) for offset in rng.permutation(offsets)]
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
            f" {num_samples} are asked for; ask for fewer or give more text"
        )
    return samples


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
            documents.append(_named(path.name, text))
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


def _sections(path: Path, content: str) -> list[Document]:
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
    return [_named(path.name, section) for section in sections]
