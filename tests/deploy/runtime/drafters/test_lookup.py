import numpy as np
import pytest

from deploy.runtime.drafters.lookup import LookupDrafter, Match, _Index, copy_onwards
from deploy.runtime.sampling import SamplingParams


def slow_find(path, lengths):
    """The longest end of the path that occurred before, by looking at every place."""
    for length in sorted(lengths, reverse=True):
        end = path[len(path) - length :]
        places = [p for p in range(length, len(path)) if path[p - length : p] == end]
        if len(path) >= length and places:
            return Match(places[-1], length)
    return None


def test_it_finds_the_last_occurrence_of_the_longest_end_however_the_text_grows():
    rng = np.random.default_rng(3)
    drafter = LookupDrafter({2: 3, 5: 9, 3: 3})
    path = [int(token) for token in rng.integers(0, 4, 5)]
    for _ in range(600):
        assert drafter.find(0, path) == slow_find(path, (2, 3, 5))
        path += [int(token) for token in rng.integers(0, 4, rng.integers(1, 4))]
        if rng.random() < 0.3:  # mostly a refused draft, now and then another conversation
            fewest = 1 if rng.random() < 0.1 else max(1, len(path) - 8)
            length = int(rng.integers(fewest, len(path)))
            assert drafter.begin(0, length) == length
            path = path[:length] + [int(token) for token in rng.integers(0, 4, 2)]


def test_it_drafts_what_followed_as_many_as_a_match_of_its_length_is_worth():
    drafter = LookupDrafter({3: 4, 2: 2})
    path = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert drafter.propose(0, path, 9, SamplingParams(), 0).tokens == (3, 4)
    assert drafter.propose(0, [*path, 3], 9, SamplingParams(), 0).tokens == (4, 5, 6, 7)
    assert drafter.propose(0, [*path, 3], 2, SamplingParams(), 0).tokens == (4, 5)
    assert drafter.propose(1, [1, 2, 3, 4], 9, SamplingParams(), 0).tokens == ()


def test_a_copy_runs_into_itself():
    drafter = LookupDrafter({2: 8})
    assert drafter.propose(0, [9, 1, 2, 3, 1, 2], 9, SamplingParams(), 0).tokens == (3, 1, 2, 3, 1, 2, 3, 1)
    assert drafter.propose(1, [4, 4, 4], 5, SamplingParams(), 0).tokens == (4, 4, 4, 4, 4)
    rng = np.random.default_rng(0)
    for _ in range(50):
        path = rng.integers(0, 5, rng.integers(1, 12)).tolist()
        position = int(rng.integers(0, len(path)))
        text = list(path)
        for step in range(20):
            text.append(text[position + step])
        assert copy_onwards(path, position, 20) == text[len(path) :]


@pytest.mark.parametrize("interrupted_in", ["find", "begin"])
def test_an_interrupt_costs_no_later_draft(monkeypatch, interrupted_in):
    drafter, longer = LookupDrafter({2: 4}), [1, 2, 3] * 20
    steps = iter([None] * 5 + [KeyboardInterrupt])

    def interrupted(method):
        def call(*arguments):
            method(*arguments)
            if next(steps) is not None:
                raise KeyboardInterrupt

        return call

    if interrupted_in == "begin":
        drafter.find(0, longer)
    with monkeypatch.context() as patched:
        patched.setattr(_Index, "add", interrupted(_Index.add))
        patched.setattr(_Index, "take_back", interrupted(_Index.take_back))
        with pytest.raises(KeyboardInterrupt):
            drafter.find(0, longer) if interrupted_in == "find" else drafter.begin(0, 40)
    for text in ([1, 2, 3, 1, 2], [5, 6, 5, 6], longer):
        drafter.begin(0, 0)
        assert drafter.find(0, text) == slow_find(text, (2,))


@pytest.mark.parametrize("num_tokens", [{}, {0: 3}, {2: 0}, {2: 65}])
def test_numbers_out_of_range_are_refused(num_tokens):
    with pytest.raises(ValueError, match="must give lengths of 1 or more 1 … 64 tokens"):
        LookupDrafter(num_tokens)
