from dataclasses import replace

import pytest

from deploy.runtime.drafters.auto import AutoDrafter, Candidate
from deploy.runtime.drafters.confident import ConfidentDrafter
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft

GREEDY = SamplingParams()


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


class Chain(NoDrafter):
    def __init__(self, length):
        self.length = length

    def propose(self, sequence, path, budget, sampling, sample_index):
        return Draft.chain(list(range(self.length)))


class VaryingHead(ConfidentDrafter):
    """Drafts of given sizes in turn."""

    taps = ()

    def __init__(self, sizes=(1, 2, 3, 4, 5)):
        self.worth, self._sizes, self._round = 9.0, sizes, 0

    def propose(self, sequence, path, budget, sampling, sample_index):
        self._round += 1
        return Draft.chain(list(range(self._sizes[self._round % len(self._sizes)])))

    def commit(self, sequence, tokens, features):
        pass


def play(drafter, clock, milliseconds, tokens, rounds=300):
    """Rounds in which a draft of n tokens costs milliseconds[n] and gives tokens[n]; n of each round."""
    drafted = []
    for _ in range(rounds):
        count = len(drafter.propose(0, [1, 2, 3], 9, GREEDY, 0))
        clock.now += milliseconds[count] / 1e3
        drafter.commit(0, [7] * tokens[count], None)
        drafted.append(count)
    return drafted


def candidates(eagle_tokens):
    return [
        Candidate("plain", NoDrafter(), 1.0, 2.0),
        Candidate("eagle", Chain(3), eagle_tokens, 3.0),
    ]


def test_it_begins_with_what_is_predicted_best():
    clock = Clock()
    assert play(AutoDrafter(candidates(2.0), clock=clock), clock, {0: 2, 3: 3}, {0: 1, 3: 2}, rounds=10) == [3] * 10
    assert play(AutoDrafter(candidates(1.2), clock=clock), clock, {0: 2, 3: 3}, {0: 1, 3: 1}, rounds=10) == [0] * 10


def test_it_leaves_a_drafter_that_does_not_keep_its_promise_and_seldom_tries_it_again():
    clock = Clock()
    drafted = play(AutoDrafter(candidates(2.0), clock=clock), clock, {0: 2, 3: 3}, {0: 1, 3: 1}, rounds=1000)
    assert drafted[0] == 3
    assert drafted[30:].count(3) <= 20


def test_it_finds_a_drafter_that_was_thought_too_little_of():
    clock = Clock()
    drafted = play(AutoDrafter(candidates(1.0), clock=clock), clock, {0: 2, 3: 3}, {0: 1, 3: 4}, rounds=200)
    assert drafted[:10] == [0] * 10
    assert drafted[100:].count(3) >= 95


def test_one_that_lost_by_far_is_tried_again_later_than_one_that_lost_by_little():
    def trials(milliseconds):
        clock = Clock()
        drafter = AutoDrafter(candidates(1.2), clock=clock)
        return play(drafter, clock, {0: 2, 3: milliseconds}, {0: 1, 3: 1}, rounds=200)[10:].count(3)

    assert trials(2.1) >= 6
    assert trials(6) <= trials(2.1) / 2


def test_one_that_lost_is_tried_again_even_if_all_answers_are_short():
    clock = Clock()
    drafter = AutoDrafter(candidates(2.0), clock=clock)

    def answers(count, milliseconds, tokens):
        drafted = []
        for _ in range(count):
            drafter.begin(0, 0)
            drafted += play(drafter, clock, milliseconds, tokens, rounds=20)
        return drafted

    hard = answers(15, {0: 2, 3: 4}, {0: 1, 3: 1})
    assert 0 < hard.count(3) <= 20
    easy = answers(60, {0: 2, 3: 3}, {0: 1, 3: 3})
    assert easy[-600:].count(3) >= 590


def test_one_that_is_certain_of_its_tokens_is_seldom_tried():
    def rounds_without_draft(is_certain):
        clock = Clock()
        plain, eagle = candidates(2.0)
        drafter = AutoDrafter([replace(plain, is_certain=is_certain), eagle], clock=clock)
        return play(drafter, clock, {0: 2, 3: 3}, {0: 1, 3: 2}, rounds=600).count(0)

    assert 0 < rounds_without_draft(True) < rounds_without_draft(False)
    assert rounds_without_draft(True) <= 0.02 * 600


def test_forwards_of_one_row_that_are_slow_only_after_others_are_found_to_be_fast():
    """Without a draft a round takes 2 ms, the first three after a draft 3 ms: less than the head gives, then more."""
    clock, last = Clock(), [3] * 3
    plain = Candidate("plain", NoDrafter(), 1.0, 3.0, is_certain=True)
    drafter = AutoDrafter([plain, Candidate("eagle", Chain(3), 2.0, 4.5)], clock=clock)
    for _ in range(2500):
        drafted = len(drafter.propose(0, [1, 2, 3], 9, GREEDY, 0))
        clock.now += (4.5 if drafted else 2.0 if not any(last[-3:]) else 3.0) / 1e3
        drafter.commit(0, [7] * (2 if drafted else 1), None)
        last.append(drafted)
    assert last[-500:].count(0) >= 450


def test_one_disturbed_round_does_not_decide():
    clock = Clock()
    drafter = AutoDrafter(candidates(2.0), clock=clock)
    play(drafter, clock, {0: 2, 3: 3}, {0: 1, 3: 2}, rounds=40)
    play(drafter, clock, {0: 2, 3: 400}, {0: 1, 3: 2}, rounds=1)
    assert play(drafter, clock, {0: 2, 3: 3}, {0: 1, 3: 2}, rounds=10).count(3) >= 7  # but for a trial


def test_reading_what_was_written_without_it_is_not_held_against_a_head():
    """Short answers, each of which begins with a prompt that the head has to read in its first round."""
    clock = Clock()
    drafter = AutoDrafter(candidates(2.0), clock=clock)
    drafted = []
    for _ in range(30):
        drafter.begin(0, 0)
        drafted += play(drafter, clock, {0: 2, 3: 12}, {0: 1, 3: 2}, rounds=1)
        drafted += play(drafter, clock, {0: 2, 3: 3}, {0: 1, 3: 2}, rounds=7)
    assert drafted.count(3) >= 0.9 * len(drafted)  # the others are trials
    assert drafter.rates()["eagle"] == pytest.approx(2 / 3 * 1e3, rel=0.01)


def test_a_head_that_reads_between_is_not_held_against_whoever_drafted():
    """Behind every round without it the head reads for long, which is no part of that round."""

    clock = Clock()

    class Reading(Chain):
        def commit(self, sequence, tokens, features):
            clock.now += 50 / 1e3

    head = Reading(3)
    drafter = AutoDrafter([Candidate("plain", NoDrafter(), 1.0, 2.0), Candidate("eagle", head, 1.0, 3.0)], clock=clock)
    play(drafter, clock, {0: 2, 3: 3}, {0: 1, 3: 1}, rounds=40)
    assert drafter.rates()["plain"] == pytest.approx(1 / 2 * 1e3, rel=0.01)


def test_a_head_that_is_slow_is_found_out_though_it_reads_first():
    clock = Clock()
    drafter = AutoDrafter(candidates(2.0), clock=clock)
    drafter.begin(0, 0)
    assert play(drafter, clock, {0: 2, 3: 6}, {0: 1, 3: 2}, rounds=60)[4:].count(3) <= 6


def test_rates_are_kept_apart_for_texts_with_and_without_a_match():
    """The head gives 4 tokens where nothing repeats and 1 where something does, the lookup there 2."""
    clock, lookup = Clock(), LookupDrafter({2: 3})
    drafter = AutoDrafter(
        [Candidate("eagle", Chain(2), 2.0, 2.0), Candidate("lookup-2", lookup, 1.5, 2.0, match_length=2)], clock=clock
    )
    paths = {False: [1, 2, 3, 4], True: [1, 2, 3, 1, 2]}
    lengths = {True: [], False: []}
    for number in range(400):
        is_match = number % 2 == 1
        drafted = len(drafter.propose(int(is_match), paths[is_match], 9, GREEDY, 0))
        clock.now += 2e-3
        drafter.commit(int(is_match), [7] * ((2 if drafted == 3 else 1) if is_match else 4), None)
        lengths[is_match].append(drafted)
    assert set(lengths[False]) == {2}
    assert lengths[True][-100:].count(3) >= 90
    assert drafter.rates()["lookup-2"] == pytest.approx(1000, rel=0.05)
    assert 500 < drafter.rates()["eagle"] < 2000


def test_a_row_is_worth_what_its_time_gives_at_the_rate_that_the_head_has_earned():
    clock, head = Clock(), VaryingHead((2,))
    drafter = AutoDrafter([Candidate("eagle", head, 3.0, 3.0)], {1: 2.0, 5: 2.8}, clock=clock)
    drafter.propose(0, [1], 9, GREEDY, 0)
    assert head.worth == pytest.approx(0.2 * 3 / 3)
    play(drafter, clock, {2: 4}, {2: 2})
    assert head.worth == pytest.approx(0.2 * 2 / 4, rel=1e-3)


def test_a_row_costs_what_it_costs_now():
    """The machine was measured while its memory was slow; now its cores are: rows cost more, one alone less."""
    head = VaryingHead()
    clock = Clock()
    drafter = AutoDrafter([Candidate("eagle", head, 3.0, 3.0)], {1: 4.0, 5: 4.8, 9: 5.6}, clock=clock)
    worths = []
    for _ in range(100):
        rows = 1 + len(drafter.propose(0, [1], 9, GREEDY, 0))
        worths.append(head.worth)
        clock.now += (2.0 + 0.6 * rows) / 1e3
        drafter.commit(0, [7] * 2, None)
    rate = 2 / (2.0 + 0.6 * 4)
    assert worths[0] == pytest.approx(0.2)
    assert 0.5 * rate < worths[-1] < 0.65 * rate


@pytest.mark.parametrize("others", ["another round", "a prompt before", "a prompt behind"])
def test_forwards_with_rows_of_others_say_nothing_of_a_rows_cost(others):
    head, clock = VaryingHead(), Clock()
    drafter = AutoDrafter([Candidate("eagle", head, 2.0, 4.0)], {1: 2.0, 5: 2.8}, clock=clock)
    for _ in range(100):
        rows = 1 + len(drafter.propose(0, [1], 9, GREEDY, 0))
        if others == "another round":
            rows += 1 + len(drafter.propose(1, [1], 9, GREEDY, 0))
        clock.now += (2.0 + 0.6 * rows) / 1e3
        if others == "a prompt before":
            drafter.commit(2, [7] * 100, None)
        drafter.commit(0, [7] * 2, None)
        if others == "another round":
            drafter.commit(1, [7] * 2, None)
        if others == "a prompt behind":
            drafter.commit(2, [7] * 100, None)
    assert head.worth / (drafter.rates()["eagle"] / 1e3) == pytest.approx(0.2, rel=0.05)


def test_rows_that_do_not_vary_leave_a_row_its_measured_cost():
    head = VaryingHead((3,))
    clock = Clock()
    drafter = AutoDrafter([Candidate("eagle", head, 3.0, 3.0)], {1: 2.0, 5: 2.8}, clock=clock)
    play(drafter, clock, {3: 4}, {3: 2}, rounds=3000)
    assert head.worth == pytest.approx(0.2 * 2 / 4, rel=1e-2)


def test_a_lookup_is_taken_only_where_the_text_has_a_match_of_its_length():
    lookup = LookupDrafter({3: 2, 2: 2})
    drafter = AutoDrafter(
        [
            Candidate("plain", NoDrafter(), 1.0, 2.0),
            Candidate("lookup-3", lookup, 3.0, 2.5, match_length=3),
            Candidate("lookup-2", lookup, 1.1, 2.5, match_length=2),
        ]
    )
    assert drafter.propose(0, [1, 2, 3, 4, 1, 2, 3], 9, GREEDY, 0).tokens == (4, 1)
    assert drafter.propose(1, [1, 2, 3, 4, 9, 2, 3], 9, GREEDY, 0).tokens == ()
    assert drafter.choices == {"plain": 1, "lookup-3": 1, "lookup-2": 0}


def test_all_drafters_go_on_from_the_same_token():
    class Wanting(NoDrafter):
        def __init__(self, wanted):
            self.wanted, self.begins = wanted, []

        def begin(self, sequence, length):
            self.begins.append(min(length, self.wanted))
            return self.begins[-1]

    first, second = Wanting(9), Wanting(7)
    drafter = AutoDrafter([Candidate("a", first, 1, 1), Candidate("b", second, 1, 1)])
    assert drafter.begin(0, 12) == 7
    assert first.begins[-1] == second.begins[-1] == 7


def test_a_head_goes_back_once_however_often_the_others_are_asked():
    """Its row also stands for the next token: each time it is asked it goes on from one token fewer than is known."""

    class Head(NoDrafter):
        def begin(self, sequence, length):
            return length - 1

    class Text(NoDrafter):
        def begin(self, sequence, length):
            return min(length, 40)

    for others in ([NoDrafter()], [NoDrafter(), Text()]):
        drafters = [Head(), *others]
        drafter = AutoDrafter([Candidate(str(index), each, 1, 1) for index, each in enumerate(drafters)])
        assert drafter.begin(0, 30) == 29
    assert drafter.begin(0, 60) == 39


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        AutoDrafter([])
