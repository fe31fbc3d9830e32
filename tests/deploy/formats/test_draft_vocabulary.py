"""draft_vocabulary.json: read back as written, and refused when it is anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.formats.draft_vocabulary import VOCABULARY_FILE, read_draft_vocabulary, write_draft_vocabulary
from deploy.formats.errors import FormatError


def test_ids_are_read_back(tmp_path: Path) -> None:
    ids = np.array([0, 3, 17, 40], dtype=np.int64)
    write_draft_vocabulary(tmp_path, ids)
    found = read_draft_vocabulary(tmp_path, 41)
    assert found is not None and found.dtype == np.int64
    assert found.tolist() == ids.tolist()


def test_without_the_file_every_token_may_be_drafted(tmp_path: Path) -> None:
    assert read_draft_vocabulary(tmp_path, 41) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a JSON object"),
        ({}, 'is not {"ids"'),
        ({"ids": []}, 'is not {"ids"'),
        ({"ids": [1], "size": 1}, 'is not {"ids"'),
        ({"ids": [0, 41]}, "not all token ids below 41"),
        ({"ids": [-1, 3]}, "not all token ids below 41"),
        ({"ids": [0, 1.5]}, "not all token ids"),
        ({"ids": [False, 3]}, "not all token ids"),
        ({"ids": [10**30]}, "not all token ids"),
        ({"ids": [3, 2]}, "do not ascend"),
        ({"ids": [3, 3]}, "do not ascend"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / VOCABULARY_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FormatError, match=message) as caught:
        read_draft_vocabulary(tmp_path, 41)
    assert VOCABULARY_FILE in str(caught.value)
