import numpy as np
import pytest

from deploy.runtime.drafters.lookup import LookupDrafter, Match
from deploy.runtime.sampling import SamplingParams


def slow_find(path, longest, shortest):
    """The longest end of the path that occurred before, by looking at every place."""
    for length in range(longest, shortest - 1, -1):
        end = path[len(path) - length :]
        places = [p for p in range(length, len(path)) if path[p - length : p] == end]
        if len(path) >= length and places:
            return Match(places[-1], length)
    return None


def test_it_finds_the_last_occurrence_of_the_longest_end_however_the_text_grows():
    rng = np.random.default_rng(3)
    drafter = LookupDrafter(longest=4, shortest=2)
    path = [int(token) for token in rng.integers(0, 4, 5)]
    for _ in range(200):
        assert drafter.find(0, path) == slow_find(path, 4, 2)
        path += [int(token) for token in rng.integers(0, 4, rng.integers(1, 4))]
        if rng.random() < 0.1:
            length = int(rng.integers(1, len(path)))
            assert drafter.begin(0, length) == length
            path = path[:length] + [int(token) for token in rng.integers(0, 4, 2)]


def test_it_drafts_what_followed_within_the_budget():
    drafter = LookupDrafter(longest=3, shortest=2, num_tokens=4)
    path = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert drafter.propose(0, path, 9, SamplingParams(), 0).tokens == (3, 4, 5, 6)
    assert drafter.propose(0, path, 2, SamplingParams(), 0).tokens == (3, 4)
    assert drafter.propose(1, [1, 2, 3, 4], 9, SamplingParams(), 0).tokens == ()


def test_lengths_that_are_out_of_order_are_refused():
    with pytest.raises(ValueError, match="shortest=3, longest=2"):
        LookupDrafter(longest=2, shortest=3)
