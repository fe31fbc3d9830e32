"""What is said of a data set that cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.data.conversations import Conversation, Kept, Lost
from train.data.describe import describe
from train.data.shards import ShardDirectory


def heldout(index: int) -> Kept:
    conversation = Conversation(np.array([1, 9, 2], dtype=np.int32), ((1, 3),), 0.0, index)
    return Kept(conversation, "heldout", "Why?", 0, ())


def test_a_data_set_that_lost_every_prompt_says_why(tmp_path: Path) -> None:
    reasons = ["prompt is empty", "prompt did not end", "prompt did not end"]
    ShardDirectory(tmp_path).write(0, [Lost(index, reason, 3) for index, reason in enumerate(reasons)])
    expected = (
        r"^generate: none of 3 prompts became a conversation \(prompt did not end: 2, prompt is empty: 1\); raise"
        r" generate\.self_written\.max_tokens"
    )
    with pytest.raises(ValueError, match=expected):
        describe(tmp_path)


def test_a_data_set_that_holds_out_everything_says_so(tmp_path: Path) -> None:
    ShardDirectory(tmp_path).write(0, [heldout(0), Lost(1, "duplicate", 3), heldout(2)])
    with pytest.raises(ValueError, match=r"^generate: all 2 conversations are held out .*lower generate\.num_heldout"):
        describe(tmp_path)
