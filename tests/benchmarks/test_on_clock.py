"""The simulated clock, on tiny models: what it says is what the costs say."""

import argparse
import json
import random
import re
import sys

import pytest

from benchmarks import on_clock
from deploy.formats.bundle import Bundle
from deploy.runtime.costs import Costs, DraftCost
from deploy.runtime.drafters import model as model_drafters
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.prompts import PromptRecord
from tests.deploy.conftest import Tiny

COSTS = Costs({"target": {1: 2.0, 4: 2.6}}, {"eagle-target": DraftCost(0.3, {1: 0.1})})
INTERMEDIATE = {"intermediate": {1: 0.5, 16: 1.5}}
ALL_COSTS = Costs(
    COSTS.rows_ms | INTERMEDIATE,
    {**COSTS.drafts, "intermediate": DraftCost(0.7, {1: 0.6}), "eagle-intermediate": DraftCost(0.1, {1: 0.05})},
)
RECORDS = [PromptRecord("a", "x", ("Hi",)), PromptRecord("b", "y", ("Who is there", "and who else"))]


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(Tiny().bundle_with_head(tmp_path / "b"))


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory):
    """Its plan says that a chain of the intermediate's is best."""
    path, plan = tmp_path_factory.mktemp("bundles") / "b", Tiny.plan()
    Tiny.hierarchy(path, None)
    plan["modes"]["chain"] = plan["modes"]["eagle"] | {"tau": 2.5, "nodes_per_round": 3.0, "levels_per_round": 3.0}
    (path / "plan.json").write_text(json.dumps(plan))
    return Bundle.open(Tiny.finish_hierarchy(path))


def test_rounds_take_what_the_costs_say(bundle):
    simulation = on_clock.Simulation(bundle, COSTS, 1)
    options = argparse.Namespace(tokens=12, temperature=0.0)
    found = on_clock.measure(simulation, ["plain", "eagle", "auto"], RECORDS, options)
    plain = found["plain"]
    assert (plain["speedup"], plain["tau"], plain["nodes_per_round"]) == (1.0, 1.0, 0.0)
    assert plain["by_category"] == {"x": 1.0, "y": 1.0}
    eagle = found["eagle"]
    least, most = 2.0, 2.6 * 5 / 4 + 0.3 + 3 * 0.1  # five rows and a draft of four levels
    assert 2.0 * eagle["tau"] / most <= eagle["speedup"] <= 2.0 * eagle["tau"] / least
    again = on_clock.measure(on_clock.Simulation(bundle, COSTS, 2), ["plain", "eagle", "auto"], RECORDS, options)
    assert again == found


def test_modes_of_unknown_cost_are_refused(bundle, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi", "category": "x"}\n')
    plain = tmp_path / "costs.json"
    plain.write_text('{"costs": {"version": 1, "rows_ms": {"target": {"1": 2.0}}, "drafts": {}}}')
    arguments = [str(bundle.path), "--prompts", str(prompts), "--categories", "x", "--tokens", "3"]
    for costs, modes, message in (
        (plain, "eagle", "--modes eagle: the costs say nothing"),
        (plain, "plain,egle", "--modes: mode='egle' is not known; use auto, plain"),
        (prompts, "plain", "--costs .*prompts.jsonl: holds no costs"),
    ):
        monkeypatch.setattr(sys, "argv", ["on_clock", *arguments, "--costs", str(costs), "--modes", modes])
        with pytest.raises(SystemExit):
            on_clock.main()
        assert re.search(message, capsys.readouterr().err)


FIRST_DRAFT = {"eagle": 0.3, "chain": 0.7, "cascade": 0.5, "cascade-lookup": 0.5}


@pytest.mark.parametrize("mode", FIRST_DRAFT)
@pytest.mark.parametrize("num_prompt", [5, 77])
def test_nobodys_reading_of_the_prompt_takes_time(monkeypatch, hierarchy, mode, num_prompt):
    """Of three tokens the prompt's forward gives one; a draft of one token follows, and may be refused."""
    monkeypatch.setattr(model_drafters, "_READ_AHEAD", 16)  # states of the prompt are read before a draft is asked for
    simulation = on_clock.Simulation(hierarchy, ALL_COSTS, 1)
    simulation.session.use(simulation.drafter(mode))
    rng = random.Random(num_prompt)
    prompt = [rng.randrange(3, 259) for _ in range(num_prompt)]
    tokens, milliseconds, counts = simulation.answer(prompt, GenerationOptions(3))
    assert len(tokens) == 3
    assert (counts.drafted, counts.rounds + counts.accepted[0]) == (1, 2)
    alone = 0 if counts.accepted[0] else 2.0
    assert milliseconds == pytest.approx(FIRST_DRAFT[mode] + 2.2 + alone)


def test_rounds_are_counted_behind_the_prompts(bundle):
    simulation = on_clock.Simulation(bundle, COSTS, 1)
    tokens, milliseconds, counts = simulation.answer([5] * 20, GenerationOptions(9))
    assert counts.rounds == counts.emitted == len(tokens) - 1
    assert milliseconds == pytest.approx(2.0 * counts.rounds)


def test_answers_of_one_token_have_no_speed_up(bundle, capsys):
    simulation = on_clock.Simulation(bundle, COSTS, 1)
    found = on_clock.measure(simulation, ["plain"], RECORDS, argparse.Namespace(tokens=1, temperature=0.0))
    assert found["plain"]["speedup"] is None
    assert found["plain"]["by_category"] == {"x": None, "y": None}
    assert capsys.readouterr().out.startswith("plain           –x plain, τ 1.000: x –  y –")


@pytest.mark.parametrize(
    ("rows", "drafts", "known"),
    [
        ({}, (), set()),
        ({}, ("intermediate",), {"chain"}),
        (INTERMEDIATE, (), {"cascade-lookup"}),
        (INTERMEDIATE, ("eagle-intermediate",), {"cascade", "cascade-lookup"}),
        (INTERMEDIATE, ("intermediate", "eagle-intermediate"), {"chain", "cascade", "cascade-lookup"}),
    ],
)
def test_auto_does_without_an_intermediate_whose_costs_are_not_stated(hierarchy, rows, drafts, known):
    costs = Costs(COSTS.rows_ms | rows, {**COSTS.drafts, **{role: ALL_COSTS.drafts[role] for role in drafts}})
    simulation = on_clock.Simulation(hierarchy, costs, 1)
    assert set(simulation.left_out) == {"chain", "cascade", "cascade-lookup"} - known
    names = {candidate.name for candidate in simulation.drafter("auto").candidates}
    assert names & {"chain", "cascade", "cascade-lookup"} == known & {"chain"}  # the one that the plan has measured
    assert "eagle" in names


def test_it_says_and_keeps_what_the_costs_leave_out(hierarchy, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi", "category": "x"}\n')
    (tmp_path / "costs.json").write_text(json.dumps(COSTS.to_json()))
    arguments = ["--prompts", tmp_path / "prompts.jsonl", "--costs", tmp_path / "costs.json", "--categories", "x"]
    arguments += ["--tokens", "2", "--json", tmp_path / "result.json"]
    monkeypatch.setattr(sys, "argv", ["on_clock", str(hierarchy.path), *map(str, arguments)])
    on_clock.main()
    assert "without chain, cascade, cascade-lookup, in auto too: the costs say nothing" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["left_out"] == ["chain", "cascade", "cascade-lookup"]
    assert list(result["modes"]) == ["plain", "auto", "lookup", "eagle", "eagle-tree", "opt-tree"]
