"""Modes side by side: fair turns, empty caches, and every figure from what was counted."""

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.benchmark import BenchRequest, bench, costs_for, make_entries, run
from deploy.runtime.costs import Costs
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.modes import DrafterFactory
from deploy.runtime.plan import Expectation, tokens_per_second
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

RECORDS = [PromptRecord("1", "a", ("Hi", "So")), PromptRecord("2", "b", ("Once upon",)), PromptRecord("3", "a", ("x",))]


@pytest.fixture
def opened(tmp_path, tiny):
    bundle = Bundle.open(tiny.bundle_with_head(tmp_path / "b"))
    session = Session.open(bundle)
    return session, DrafterFactory(bundle, session.backend, "cpu", None)


def test_every_mode_takes_its_turn_and_begins_in_turn(opened, monkeypatch):
    session, factory = opened
    entries = make_entries(factory, ("lookup", "eagle"), costs_for(factory, ("lookup",)))
    names = {id(entry.drafter): entry.name for entry in entries}
    order = []
    use = session.use
    monkeypatch.setattr(session, "use", lambda drafter: (order.append(names[id(drafter)]), use(drafter)))
    run(session, entries, RECORDS, GenerationOptions(3), repeats=2)
    turns = [order[place : place + 3] for place in range(0, len(order), 3)]
    assert [turn[0] for turn in turns] == ["plain", "lookup", "eagle", "lookup", "eagle", "plain"]
    assert all(set(turn) == {"plain", "lookup", "eagle"} for turn in turns)
    for entry in entries:
        assert [[answer.record.identity for answer in one] for one in entry.passes] == [["1", "1", "2", "3"]] * 2
        assert all(answer.result.num_cached_tokens == 0 for one in entry.passes for answer in (one[0], *one[2:]))


def test_the_result_counts_every_answer_and_all_modes_agree(opened):
    session, factory = opened
    ticks = []

    def begin(num_answers):
        ticks.append(num_answers)
        return lambda: ticks.append(1)

    options = GenerationOptions(12, SamplingParams(0.7, seed=3))
    request = BenchRequest(("auto", "opt-tree"), RECORDS, options, repeats=2, synthetic=(0.5,))
    result, costs = bench(session, factory, request, begin)
    assert ticks[0] == sum(ticks[1:]) == 4 * 2 * (3 + 1)  # four answers, two passes, three modes and one synthetic
    assert result["rows_ms"]["target"]["1"] == costs.rows_ms["target"][1]
    assert list(result["modes"]) == ["plain", "auto", "opt-tree"]
    for found in (*result["modes"].values(), *result["synthetic"]["modes"].values()):
        assert found["identical_to_plain"] == {"same": 8, "total": 8}
        assert list(found["by_category"]) == ["a", "b"]
    assert sum(result["modes"]["auto"]["choices"].values()) == pytest.approx(1, abs=1e-3)


def test_the_prediction_is_the_cost_models_for_what_was_counted(opened):
    session, factory = opened
    request = BenchRequest(("opt-tree",), RECORDS, GenerationOptions(12))
    result, costs = bench(session, factory, request, lambda _count: lambda: None)
    found = result["modes"]["opt-tree"]
    expected = Expectation(found["tau"], found["nodes_per_round"], found["levels_per_round"], found["width"])
    assert found["predicted_tok_s"] == pytest.approx(tokens_per_second(costs, "eagle-target", expected), rel=1e-3)
    plain = result["modes"]["plain"]
    assert plain["predicted_tok_s"] == pytest.approx(1e3 / costs.forward_ms("target", 1), rel=0.05)


def test_only_what_the_modes_may_need_is_timed(opened):
    _session, factory = opened
    assert not costs_for(factory, ("plain", "lookup")).drafts
    assert set(costs_for(factory, ("eagle",)).drafts) == {"eagle-target"}


def test_a_mode_without_its_models_is_refused(tmp_path, tiny):
    bundle = Bundle.open(tiny.bundle(tmp_path / "b"))
    factory = DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None)
    with pytest.raises(ValueError, match=r"mode='chain' needs intermediate"):
        make_entries(factory, ("chain",), Costs({"target": {1: 1.0}}, {}))
