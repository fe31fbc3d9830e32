"""Answers that go round in circles end where that is known, and their share is counted."""

from __future__ import annotations

import numpy as np

from benchmarks.acceptance import looping_share, without_loop
from train.data.conversations import Conversation

QUESTION = [5, 6, 7]


def answered(answer: list[int]) -> Conversation:
    text = np.array([*QUESTION, *answer], np.int32)
    return Conversation(text, ((len(QUESTION), len(text)),), 0.0, 3)


def test_an_answer_ends_where_it_is_known_to_loop() -> None:
    found = without_loop(answered(list(range(100, 120)) + [1, 2, 3, 4] * 40))
    # 20 words, then a loop of period 4: the last 48 tokens stand 4 before as well from 72 tokens on, asked every 16.
    assert found.spans == ((3, 83),)
    assert found.token_ids.tolist() == QUESTION + list(range(100, 120)) + [1, 2, 3, 4] * 15
    assert found.index == 3


def test_an_answer_that_never_loops_stays_whole() -> None:
    whole = answered(list(range(300)))
    assert without_loop(whole).token_ids.tolist() == whole.token_ids.tolist()


def test_the_looping_share_is_of_all_that_was_written() -> None:
    looping, whole = answered([1, 2] * 100), answered(list(range(200)))
    # 200 tokens of period 2 are known to loop after 64.
    assert looping_share([looping, whole]) == 1 - (64 + 200) / 400
