from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.data.conversations import Conversation, Kept, Lost, from_record, read_conversations, read_slots, to_line
from train.data.shards import ShardDirectory


def conversation(index: int, spans: tuple[tuple[int, int], ...] = ((2, 4),)) -> Conversation:
    return Conversation(np.arange(7, dtype=np.int32) + index, spans, 0.6, index)


def slot(index: int, split: str = "train") -> Kept:
    return Kept(conversation(index), split, "why «that»?\n", 3, ("response cut",))


def test_the_loss_mask_is_true_where_the_target_wrote() -> None:
    found = conversation(0, ((1, 3), (5, 7)))
    assert found.loss_mask().tolist() == [False, True, True, False, False, True, True]
    assert found.num_written == 4


def test_a_line_gives_back_what_it_was_made_of(tmp_path: Path) -> None:
    import json

    for each in (slot(4), Lost(9, "duplicate", 17)):
        line = to_line(each)
        assert "\n" not in line
        again = from_record(json.loads(line))
        if isinstance(each, Kept) and isinstance(again, Kept):
            assert again.conversation.token_ids.dtype == np.int32
            assert again.conversation.token_ids.tolist() == each.conversation.token_ids.tolist()
            assert again.conversation.spans == each.conversation.spans
            assert (again.split, again.prompt, again.notes, again.num_written) == ("train", each.prompt, each.notes, 5)
        else:
            assert again == each


def test_splits_are_read_apart_in_order_over_all_shards(tmp_path: Path) -> None:
    shards = ShardDirectory(tmp_path)
    shards.write(1, [slot(5), slot(6, "heldout"), Lost(7, "duplicate", 0)])
    shards.write(0, [slot(0, "heldout"), slot(2), slot(3)])
    assert [found.index for found in read_conversations(tmp_path, "train")] == [2, 3, 5]
    assert [found.index for found in read_conversations(tmp_path, "heldout")] == [0, 6]


def test_an_unknown_split_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='test' is unknown; use train or heldout"):
        read_conversations(tmp_path, "test")
    ShardDirectory(tmp_path).write(0, [slot(0)])
    with pytest.raises(ValueError, match=r"holds no heldout conversations"):
        read_conversations(tmp_path, "heldout")


@pytest.mark.parametrize("damage", ["{", '{"index": 1}', "[]", '{"index": 1, "split": "train", "spans": 3}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "shard-000000.jsonl"
    path.write_text(to_line(slot(0)) + "\n" + damage + "\n")
    with pytest.raises(ValueError, match=r"shard-000000\.jsonl, line 2: is damaged"):
        list(read_slots(path))
