import pytest

from deploy.runtime.costs import Costs, DraftCost
from deploy.runtime.drafters.lookup import NUM_TOKENS
from deploy.runtime.plan import (
    LOOKUP_SURVIVAL,
    Expectation,
    best_chain,
    best_lookups,
    chain_expectation,
    round_ms,
    tokens_per_second,
    worth_of_row,
)

ROWS = {"target": {1: 2.0, 4: 2.6, 8: 4.0}}
COSTS = Costs(ROWS, {"eagle-target": DraftCost(0.3, {1: 0.2, 4: 0.4})})


def test_forwards_between_measured_counts_are_interpolated_and_beyond_them_in_proportion():
    assert COSTS.forward_ms("target", 2) == pytest.approx(2.2)
    assert COSTS.forward_ms("target", 8) == 4.0
    assert COSTS.forward_ms("target", 16) == 8.0


def test_a_round_is_a_draft_and_a_forward_over_its_rows_and_one_more():
    expected = Expectation(tokens=2.1, nodes=3, levels=3)
    assert round_ms(COSTS, "eagle-target", expected) == pytest.approx(0.3 + 2 * 0.2 + 2.6)
    assert tokens_per_second(COSTS, "eagle-target", expected) == pytest.approx(2.1e3 / 3.3)
    assert tokens_per_second(COSTS, None, Expectation(1.0, 0)) == pytest.approx(500)


def test_a_chains_tokens_are_one_and_the_shares_of_rounds_that_reach_each_place():
    assert chain_expectation([0.6, 0.3], 2).tokens == pytest.approx(1.9)
    assert chain_expectation([0.6, 0.3], 4).tokens == pytest.approx(1.9 + 0.15 + 0.075)
    assert chain_expectation([0.6], 2).tokens == pytest.approx(1.96)


def test_the_best_chain_is_the_one_that_slow_search_finds():
    for survival in ([0.9, 0.81, 0.73, 0.65], [0.5, 0.25, 0.12, 0.06], [0.05, 0.01, 0.0, 0.0]):
        rates = [
            (1 + sum(survival[:n])) / (0.3 + (n - 1) * 0.2 + COSTS.forward_ms("target", 1 + n)) for n in range(1, 5)
        ]
        best = best_chain(COSTS, "eagle-target", survival).levels
        if best <= 4:
            assert best == rates.index(max(rates)) + 1


def test_a_row_must_be_worth_what_its_time_gives_anyway():
    expected = best_chain(COSTS, "eagle-target", [0.5, 0.25, 0.12, 0.06])
    rate = expected.tokens / round_ms(COSTS, "eagle-target", expected)
    assert worth_of_row(COSTS, "eagle-target", expected) == pytest.approx(0.2 * rate)
    free_rows = Costs({"target": {1: 2.0, 8: 2.0}}, COSTS.drafts)
    assert worth_of_row(free_rows, "eagle-target", expected) == 0.0


def test_fewer_rows_never_cost_more():
    noisy = Costs({"target": {1: 9.0, 4: 2.6, 8: 4.0}}, {})
    assert noisy.forward_ms("target", 1) == noisy.forward_ms("target", 3) == 2.6


def test_a_lookup_drafts_as_many_tokens_as_pay_on_this_machine():
    found = best_lookups(COSTS)
    assert list(found) == list(LOOKUP_SURVIVAL) == list(NUM_TOKENS)
    for length, survival in LOOKUP_SURVIVAL.items():
        assert list(survival) == sorted(survival, reverse=True)
        rates = [
            (1 + sum(survival[:n])) / (0.02 + COSTS.forward_ms("target", 1 + n)) for n in range(1, len(survival) + 1)
        ]
        assert found[length].nodes == rates.index(max(rates)) + 1
        assert found[length].tokens == pytest.approx(1 + sum(survival[: int(found[length].nodes)]))
    tokens = [expected.nodes for expected in found.values()]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]
    free = best_lookups(Costs({"target": {1: 2.0, 16: 2.0}}, {}))
    assert {expected.nodes for expected in free.values()} == {15}
