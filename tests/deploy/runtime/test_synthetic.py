"""Drafts of a known quality: as often right as asked, and never part of an answer that is not the target's own."""

import numpy as np
import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.measure import after_prompts
from deploy.runtime.modes import DrafterFactory
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from deploy.runtime.synthetic import SyntheticDrafter, check_rates, parse_rates, rates_survival
from deploy.runtime.tree import MOST_NODES

GREEDY = SamplingParams()


def num_right(drafter, text, position):
    """How many of the drafted tokens behind text[:position] are the text's, counted from the first."""
    drafted = drafter.propose(0, text[:position], 99, GREEDY, 0).tokens
    pairs = list(zip(drafted, text[position:], strict=False))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))


@pytest.mark.parametrize("rates", [(0.8, 0.6, 0.5), (0.33,), (1.0, 0.0), (0.0, 1.0), (0.9, 0.9, 0.9, 0.9)])
def test_each_place_is_right_in_its_share_of_the_rounds_that_reach_it_to_within_one(rates):
    text = [int(token) for token in np.random.default_rng(3).integers(0, 263, 700)]
    drafter = SyntheticDrafter(rates, 263, seed=5)
    drafter.tell([text])
    right = [num_right(drafter, text, position) for position in range(1, 600)]
    reached = len(right)
    for place, rate in enumerate(rates):
        accepted = sum(found > place for found in right)
        assert abs(accepted - rate * reached) <= 1
        reached = accepted


def test_the_same_seed_gives_the_same_drafts_and_another_gives_others():
    text = list(range(100))

    def drafts(seed):
        drafter = SyntheticDrafter((0.5, 0.5), 263, seed=seed)
        drafter.tell([text])
        return [drafter.propose(0, text[:position], 9, GREEDY, 0).tokens for position in range(1, 80)]

    assert drafts(1) == drafts(1) != drafts(2)


def test_a_draft_has_as_many_tokens_as_rates_and_no_more_than_the_budget():
    drafter = SyntheticDrafter((1, 1, 1), 263)
    drafter.tell([[9, 9], [1, 2, 3, 4, 5, 6]])
    assert drafter.propose(0, [1, 2], 9, GREEDY, 0).tokens == (3, 4, 5)
    assert drafter.propose(0, [1, 2, 3], 2, GREEDY, 0).tokens == (4, 5)
    assert len(drafter.propose(0, [1, 2, 3, 4, 5], 9, GREEDY, 0)) == 3  # beyond the answer's end too


def test_an_answer_with_synthetic_drafts_is_the_targets_own_and_an_inner_drafter_only_costs(tmp_path, tiny):
    bundle = Bundle.open(tiny.bundle_with_head(tmp_path / "b"))
    session = Session.open(bundle)
    prompt, options = session.encode_raw("Once"), GenerationOptions(90, SamplingParams(0.8, seed=2))
    expected = session.generate(prompt, options).token_ids
    inner = DrafterFactory(bundle, session.backend, "cpu", None).make("eagle")
    for drafter in (SyntheticDrafter((0.8, 0.5), 263), SyntheticDrafter((0.8, 0.5), 263, inner=inner)):
        drafter.tell([[*prompt, *expected]])
        session.use(drafter)
        found = session.generate(prompt, options)
        assert found.token_ids == expected
        counts = after_prompts(found.speculation, 1)
        assert counts.acceptance_by_position == pytest.approx((0.8, 0.5), abs=0.05)


def test_survival_is_the_product_of_the_rates():
    assert rates_survival((0.8, 0.5, 0.25)) == pytest.approx((0.8, 0.4, 0.1))


@pytest.mark.parametrize("rates", [(), (1.1,), (-0.1,), (float("nan"),), (0.5,) * (MOST_NODES + 1)])
def test_rates_that_are_no_shares_are_refused(rates):
    with pytest.raises(ValueError, match="synthetic acceptance"):
        check_rates(rates)


def test_rates_are_read_from_a_text():
    assert parse_rates("0.8, 0.6,1") == (0.8, 0.6, 1.0)
    with pytest.raises(ValueError, match=r"'0.8,x' is not a list of shares such as 0\.8,0\.6,0\.5"):
        parse_rates("0.8,x")
