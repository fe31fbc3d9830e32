"""Answers that go round in circles, against a slow definition."""

from __future__ import annotations

import random

import pytest

from train.data.loops import CHECKED_EVERY, LONGEST_PERIOD, LOOP_TOKENS, is_looping, until_loop


def loops_slowly(answer: list[int]) -> bool:
    for period in range(1, LONGEST_PERIOD + 1):
        places = range(len(answer) - LOOP_TOKENS, len(answer))
        if places[0] - period >= 0 and all(answer[place] == answer[place - period] for place in places):
            return True
    return False


@pytest.mark.parametrize("period", [1, 2, 3, 17, 48, 64])
def test_an_answer_ends_where_it_has_looped_for_long_enough(period: int) -> None:
    rng = random.Random(period)
    beginning = [rng.randrange(10**6) for _ in range(21)]
    loop = [rng.randrange(10**6) for _ in range(period)]
    answer = (beginning + loop * 200)[:700]
    kept = until_loop(answer)
    certain = len(beginning) + period + LOOP_TOKENS
    assert certain <= len(kept) < certain + CHECKED_EVERY
    assert list(kept) == answer[: len(kept)]


def test_it_agrees_with_the_definition_at_the_lengths_where_it_is_asked() -> None:
    rng = random.Random(0)
    for _ in range(30):
        piece = [rng.randrange(3) for _ in range(rng.randrange(1, 90))]
        answer = [rng.randrange(3) for _ in range(rng.randrange(30))] + piece * 8
        for size in range(len(answer) + 1):
            expected = size % CHECKED_EVERY == 0 and size > LOOP_TOKENS and loops_slowly(answer[:size])
            assert is_looping(answer[:size]) == expected, (size, answer[:size])


@pytest.mark.parametrize("period", [65, 100])
def test_longer_periods_and_texts_without_end_are_kept_whole(period: int) -> None:
    rng = random.Random(period)
    loop = [rng.randrange(10**6) for _ in range(period)]
    for answer in (loop * 5, [rng.randrange(5) for _ in range(600)], [], [1] * LOOP_TOKENS):
        assert until_loop(answer) == answer
