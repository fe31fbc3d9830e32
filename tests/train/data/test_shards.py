from __future__ import annotations

from pathlib import Path

import pytest

from train.data.conversations import Lost
from train.data.shards import ShardDirectory


def lost(*indices: int) -> list[Lost]:
    return [Lost(index, "duplicate", 2) for index in indices]


def test_a_shard_is_read_as_it_was_written_and_a_missing_one_is_none(tmp_path: Path) -> None:
    shards = ShardDirectory(tmp_path)
    shards.write(3, lost(12, 13))
    assert shards.read(3) == lost(12, 13)
    assert shards.read(2) is None
    assert shards.num_tokens() == 4


def test_an_interrupted_write_leaves_no_shard_and_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    shards = ShardDirectory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            shards.write(0, lost(1))
    assert shards.read(0) is None
    assert len(list(tmp_path.iterdir())) == 1
    ShardDirectory(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_later_shards_can_be_removed(tmp_path: Path) -> None:
    shards = ShardDirectory(tmp_path)
    for number in (0, 1, 2, 11):
        shards.write(number, lost(number))
    shards.remove_from(2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["shard-000000.jsonl", "shard-000001.jsonl"]
