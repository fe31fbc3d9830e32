"""draft_vocabulary.json beside a model that drafts: which of its tokens it may draft, and so which rows its head needs.

    {"ids": [0, 2, 17, …]}      the target's ids, ascending

The model itself is whole, and any program can run it; a runtime that knows the file loads these rows of the head alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.formats.errors import FormatError
from deploy.formats.model_dir import read_json

VOCABULARY_FILE = "draft_vocabulary.json"
Ids = npt.NDArray[np.int64]


def write_draft_vocabulary(directory: Path, ids: Ids) -> None:
    """ids: int64 [D], ascending."""
    (directory / VOCABULARY_FILE).write_text(json.dumps({"ids": ids.tolist()}) + "\n", encoding="utf-8")


def read_draft_vocabulary(directory: Path, vocab_size: int) -> Ids | None:
    """The ids, int64 [D], ascending; None where there is no such file: every token may be drafted.

    Raises FormatError when they do not ascend within a vocabulary of `vocab_size`.
    """
    path = directory / VOCABULARY_FILE
    if not path.exists():
        return None
    raw = read_json(path)
    ids = raw.get("ids")
    if set(raw) != {"ids"} or not isinstance(ids, list) or not ids:
        raise FormatError(f'{path}: is not {{"ids": [an id, …]}}')
    if not all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < vocab_size for index in ids):
        raise FormatError(f"{path}: ids are not all token ids below {vocab_size}")
    found = np.array(ids, dtype=np.int64)
    if (np.diff(found) <= 0).any():
        raise FormatError(f"{path}: ids do not ascend")
    return found
