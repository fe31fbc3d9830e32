"""plan.json: read as it was written, or refused in one line."""

import json
from pathlib import Path

import pytest

from deploy.formats.bundle import Bundle
from deploy.formats.errors import BundleError
from deploy.runtime import auto_mode
from deploy.runtime.auto_mode import auto_drafter, machine_costs, read_plan
from deploy.runtime.costs import Costs, DraftCost
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.modes import DrafterFactory
from deploy.runtime.plan import best_lookups, chain_expectation
from deploy.runtime.plan_file import make_plan, read_plan_file
from deploy.runtime.session import Session


@pytest.fixture
def planned(tmp_path, tiny):
    def make(content):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "plan.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return Bundle.open(tiny.bundle_with_head(tmp_path / "b"))

    return make


def test_a_plan_is_read_as_it_is(planned, tiny):
    found = read_plan_file(planned(tiny.plan()))
    assert found.choice == "eagle"
    assert found.costs.forward_ms("target", 1) == 2.0
    expected = found.expectations()["eagle"]
    assert (expected.tokens, expected.nodes, expected.levels, expected.draft_ms) == (1.7, 2.0, 2.0, 0.3)


def test_a_bundle_without_a_plan_has_none(tmp_path, tiny):
    bundle = Bundle.open(tiny.bundle(tmp_path / "b"))
    assert read_plan_file(bundle) is None
    assert read_plan(bundle) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"machine": 3},
        {"costs": {}},
        {"costs": {"version": 1, "rows_ms": 7, "drafts": {}}},
        {"modes": []},
        {"modes": {"plain": {}}},
        {"modes": {"dance": {"tau": 1}}, "choice": "dance"},
        {"modes": {"plain": {"tau": "fast", "nodes_per_round": 0, "levels_per_round": 0, "width": 1}}},
        {"choice": "chain"},
        {"choice": ["eagle"]},
    ],
)
def test_a_malformed_plan_is_refused_naming_the_file(planned, tiny, change):
    bundle = planned(tiny.plan() | change)
    with pytest.raises(BundleError, match=r"plan\.json: "):
        read_plan(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000])
def test_what_is_no_object_is_refused(planned, content):
    with pytest.raises(BundleError, match=r"plan\.json: is not a plan"):
        read_plan_file(planned(content))


def test_a_malformed_plan_stops_mode_auto_and_no_other(planned):
    bundle = planned("{}")
    Session.open(bundle, mode="eagle")
    with pytest.raises(BundleError, match=r"plan\.json"):
        Session.open(bundle, mode="auto")


def test_auto_begins_with_what_costs_and_acceptance_promise(planned, tiny):
    plan = tiny.plan()
    bundle, costs = planned(plan), Costs.from_json(plan["costs"])
    drafter = auto_drafter(DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None), costs)
    tokens = {found.name: found.tokens for found in drafter.candidates}
    lookups = {f"lookup-{length}": expected.tokens for length, expected in best_lookups(costs).items()}
    assert tokens == {"plain": 1.0, **lookups, "eagle": tokens["eagle"]}
    assert 1 < tokens["lookup-2"] < tokens["lookup-16"]


@pytest.mark.parametrize(("tau", "is_loaded"), [(1.1, False), (1.7, True)])
def test_an_intermediate_is_loaded_only_where_the_plan_gives_it_a_chance(planned, tiny, monkeypatch, tau, is_loaded):
    plan = tiny.plan()
    plan["modes"]["chain"] = plan["modes"]["eagle"] | {"tau": tau}
    bundle = planned(plan)
    factory = DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None)
    make = factory.make
    monkeypatch.setattr(
        factory, "make", lambda mode, options=None: NoDrafter() if mode == "chain" else make(mode, options)
    )
    monkeypatch.setattr(auto_mode, "available_modes", lambda _bundle: ("plain", "eagle", "chain"))
    names = {found.name for found in auto_drafter(factory, Costs.from_json(plan["costs"])).candidates}
    assert ("chain" in names) == is_loaded


@pytest.mark.parametrize(("row_ms", "depth"), [(0.01, 6), (0.3, 2), (2.0, None)])
def test_without_a_plan_auto_knows_of_an_intermediate_what_it_was_worth_when_it_was_made(tmp_path, tiny, row_ms, depth):
    bundle = Bundle.open(tiny.finish_hierarchy(tiny.hierarchy(tmp_path / "b", None), ("target", "intermediate")))
    drafts = {"intermediate": DraftCost(first_ms=row_ms, level_ms={1: row_ms})}
    costs = Costs({"target": {1: 2.0, 8: 2.0}, "intermediate": {1: row_ms}}, drafts)
    factory = DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None)
    found = {each.name: each for each in auto_drafter(factory, costs).candidates}
    if depth is None:
        assert "chain" not in found
        return
    survival = bundle.component("intermediate").drafter.acceptance.by_position
    assert found["chain"].tokens == chain_expectation(survival, depth).tokens
    assert found["chain"].drafter.limits.depth == depth


@pytest.fixture
def measured(monkeypatch):
    """What `machine_costs` measures, one after another, without the time that it takes."""
    found = []

    def measure(_factory):
        found.append(Costs({"target": {1: float(len(found) + 1)}}, {}))
        return found[-1]

    monkeypatch.setattr(auto_mode, "measure_costs", measure)
    return found


def test_costs_are_measured_once_for_each_build_of_the_library(tmp_path, tiny, measured, monkeypatch):
    bundle = Bundle.open(tiny.bundle(tmp_path / "b"))
    factory = DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None)
    first = machine_costs(factory)
    assert machine_costs(factory) == first == measured[0]
    (tmp_path / "other.so").write_bytes(b"faster")
    monkeypatch.setattr(auto_mode, "library_path", lambda: tmp_path / "other.so")
    assert machine_costs(factory) == measured[1]
    assert len(measured) == 2


def test_a_user_without_a_home_measures_and_keeps_nothing(tmp_path, tiny, measured, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    bundle = Bundle.open(tiny.bundle(tmp_path / "b"))
    factory = DrafterFactory(bundle, Session.open(bundle).backend, "cpu", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert machine_costs(factory) == measured[0]
    assert "not kept (Could not determine home directory.; set XDG_CACHE_HOME" in caplog.text


def test_a_measurement_becomes_a_plan_with_the_fastest_mode_as_its_choice():
    found = {
        "tau": 1.5,
        "survival": [0.5],
        "acceptance_by_position": [0.5],
        "nodes_per_round": 1.0,
        "levels_per_round": 1.0,
        "width": 1,
        "predicted_tok_s": 9.0,
        "round_ms": {"draft": 0.4, "verify": 2.0, "other": 0.1},
        "e2e_tok_s": 1.0,
    }
    modes = {"plain": found | {"decode_tok_s": None, "round_ms": None}, "eagle": found | {"decode_tok_s": 8.0}}
    costs = Costs({"target": {1: 2.0}}, {})
    plan = make_plan({"machine": {"cpu": "x"}, "modes": modes}, costs)
    assert (plan["version"], plan["machine"], plan["choice"]) == (1, {"cpu": "x"}, "eagle")
    assert plan["costs"] == costs.to_json()
    assert plan["modes"]["eagle"]["draft_ms"] == 0.4
    assert plan["modes"]["plain"]["draft_ms"] is None
    assert "e2e_tok_s" not in plan["modes"]["eagle"]
