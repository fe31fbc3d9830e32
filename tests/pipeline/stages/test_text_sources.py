"""What of texts from outside enters a key: content, and never a place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.text_sources import check_documents, fingerprint, keyed, keyed_documents, packages


def config(**changes: Any) -> dict[str, Any]:
    fields = {"source": "python", "path": None, "dataset": None, "dataset_split": "train", "column": "text"}
    return fields | changes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data set in a local directory, with what `datasets` ignores beside it."""
    for name in ("set/a.jsonl", "set/more/b.jsonl", "set/.git/index", "set/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "set"


def test_nothing_but_the_path_is_left_out_of_pythons_own_texts() -> None:
    expected = {"source": "python", "dataset": None, "dataset_split": "train", "column": "text"}
    assert keyed_documents(config()) == keyed(config(), "python") == expected
    assert fingerprint(config(), "python", "key") == {}


def test_a_file_enters_by_its_content_and_its_format(tmp_path: Path) -> None:
    found = []
    for name, content in (("a.jsonl", b"x"), ("b.jsonl", b"x"), ("c.jsonl", b"y"), ("d.txt", b"x")):
        (tmp_path / name).write_bytes(content)
        text = config(source="file", path=str(tmp_path / name))
        found.append((keyed_documents(text), fingerprint(text, "file", "key")))
    assert found[0] == found[1]
    assert found[0][1] == {"key.path": hashlib.sha256(b"x").hexdigest()}
    assert found[2][1] != found[0][1]
    assert (found[0][0]["format"], found[3][0]["format"]) == ("jsonl", "text")
    assert found[3][1] == found[0][1]


def test_a_data_set_in_a_directory_enters_by_its_files(directory: Path) -> None:
    text = config(source="dataset", dataset=str(directory))
    first = keyed_documents(text), fingerprint(text, "dataset", "key")
    assert first[1] == {
        f"key.dataset/{name}": hashlib.sha256(f"set/{name}".encode()).hexdigest()
        for name in ("a.jsonl", "more/b.jsonl")
    }
    moved = directory.rename(directory.with_name("moved"))
    text = config(source="dataset", dataset=str(moved))
    assert (keyed_documents(text), fingerprint(text, "dataset", "key")) == first
    (moved / "a.jsonl").write_text("other")
    assert fingerprint(text, "dataset", "key") != first[1]


def test_a_data_set_of_the_hub_enters_by_its_id() -> None:
    text = config(source="dataset", dataset="owner/set")
    assert keyed_documents(text)["dataset"] == "owner/set"
    assert fingerprint(text, "dataset", "key") == {}


def test_only_a_data_set_needs_the_library_of_data_sets() -> None:
    assert packages("dataset") == ("datasets",)
    assert packages("file") == packages("python") == ()


@pytest.mark.parametrize(
    "text", [config(source="file"), config(source="file", path="nowhere.txt"), config(source="dataset")]
)
def test_texts_that_are_not_there_have_no_digest(text: dict[str, Any]) -> None:
    assert fingerprint(text, text["source"], "key") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (config(source="file"), r"^key\.source=file needs key\.path$"),
        (config(source="dataset"), r"^key\.source=dataset needs key\.dataset$"),
        (config(source="file", path="nowhere.txt"), r"^key\.path=nowhere\.txt is not a file"),
        (config(path="mine.txt"), r"^key\.path=mine\.txt is not read where key\.source=python; set key\.source=file"),
        (config(source="file", path="a", dataset="b"), r"^key\.dataset=b is not read .*; set key\.source=dataset"),
    ],
)
def test_texts_that_are_not_named_or_cannot_be_read_are_refused(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_documents(text, "key")
