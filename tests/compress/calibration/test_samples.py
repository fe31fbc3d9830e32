"""The file of samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.calibration.samples import Sample, read_samples, spread, write_samples
from compress.errors import SettingError

SAMPLES = [
    Sample("prose", "calibration", "topics/if", (5, 6, 7)),
    Sample("code", "calibration", "lib/os.py", (8,)),
    Sample("prose", "heldout", "topics/for", (9, 10)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_samples(tmp_path / "samples.jsonl", SAMPLES, lambda ids: f"{len(ids)} “tokens”\n")
    return tmp_path / "samples.jsonl"


def test_samples_come_back_by_split_in_order(path: Path) -> None:
    assert read_samples(path, "calibration") == SAMPLES[:2]
    assert read_samples(path, "heldout") == SAMPLES[2:]
    assert read_samples(path, "calibration", ["prose"]) == SAMPLES[:1]


def test_each_line_shows_its_text(path: Path) -> None:
    assert '"text": "3 “tokens”\\n"' in path.read_text(encoding="utf-8").splitlines()[0]


def test_a_group_without_samples_is_named_with_those_that_have_some(path: Path) -> None:
    with pytest.raises(SettingError, match=r"^calibration=\['prose', 'chat'\].* no chat .*are: code, prose"):
        read_samples(path, "calibration", ["prose", "chat"])


def test_fewer_samples_are_taken_from_the_groups_in_turn() -> None:
    many = [Sample(group, "calibration", f"{group}{i}", (i,)) for group in ("a", "b", "c") for i in range(4)]
    assert spread(many, None) == many
    assert [sample.source for sample in spread(many, 5)] == ["a0", "b0", "c0", "a1", "b1"]
    with pytest.raises(SettingError, match=r"^num_samples=13: calibrate made only 12"):
        spread(many, 13)
