"""The simulated clock, on tiny models: what it says is what the costs say."""

import argparse
import re
import sys

import pytest

from benchmarks import on_clock
from deploy.formats.bundle import Bundle
from deploy.runtime.costs import Costs, DraftCost
from deploy.runtime.prompts import PromptRecord
from tests.deploy.conftest import Tiny

COSTS = Costs({"target": {1: 2.0, 4: 2.6}}, {"eagle-target": DraftCost(0.3, {1: 0.1})})
RECORDS = [PromptRecord("a", "x", ("Hi",)), PromptRecord("b", "y", ("Who is there", "and who else"))]


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(Tiny().bundle_with_head(tmp_path / "b"))


def test_rounds_take_what_the_costs_say(bundle):
    simulation = on_clock.Simulation(bundle, COSTS, 1)
    options = argparse.Namespace(tokens=12, temperature=0.0)
    found = on_clock.measure(simulation, ["plain", "eagle", "auto"], RECORDS, options)
    assert found["plain"] == {"speedup": 1.0, "tau": 1.0, "drafted_per_round": 0.0, "by_category": {"x": 1.0, "y": 1.0}}
    eagle = found["eagle"]
    least, most = 2.0, 2.6 + 0.3 + 3 * 0.1
    assert 2.0 * eagle["tau"] / most * 0.9 <= eagle["speedup"] <= 2.0 * eagle["tau"] / least
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
        (plain, "plain,egle", "--modes egle: the bundle can do auto, plain"),
        (prompts, "plain", "--costs .*prompts.jsonl: holds no costs"),
    ):
        monkeypatch.setattr(sys, "argv", ["on_clock", *arguments, "--costs", str(costs), "--modes", modes])
        with pytest.raises(SystemExit):
            on_clock.main()
        assert re.search(message, capsys.readouterr().err)
