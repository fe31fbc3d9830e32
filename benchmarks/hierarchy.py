"""Where a hierarchy pays: a cascade (EAGLE → intermediate → target) against EAGLE on the target itself, as a map.

    python -m benchmarks.hierarchy BUNDLE [--eagle 0.45,0.6,0.75] [--json OUT]
    python -m benchmarks.hierarchy --costs RESULT.json …     with T(rows) and draft costs that a result holds

"Speculative Decoding Meets Quantization" (arXiv 2505.22179) found the cascade 1.31 times as fast as EAGLE-2 over one
4-bit 70B target. Whether it is depends on three numbers: what a verified row costs (T(rows), measured here on the
bundle's target), what the intermediate costs (its T(1) over the target's, an axis of the map), and how often the
target says what the intermediate says (the other axis). EAGLE's own acceptance is stated too: a draft is accepted with
this probability where all before it were, over either model.

Every figure is the cost model's (deploy/runtime/plan.py) with the best sizes for either side: EAGLE drafts chains of 1
to 6 levels, a cascade 1 to 12 tokens. The heads' drafts are measured on the bundle's, and cost the same share of the
intermediate's T(1) as of the target's. Each cell is then played by mode auto with drafters that cost and give what the
cell says, on a clock of its own; "auto" is the share of cells in which it spends most rounds on the better side, those
within 3 % of each other left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import fingerprint, write_json
from benchmarks.on_clock import read_stated
from deploy.formats.bundle import Bundle
from deploy.kernels.cpu.library import shared_runtime
from deploy.runtime.costs import Costs, DraftCost, measure_drafts, measure_rows
from deploy.runtime.drafters.auto import AutoDrafter, Candidate
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.modes import DrafterFactory
from deploy.runtime.plan import best_chain, round_ms
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

COST_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
ACCEPTANCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_EAGLE = (0.45, 0.6, 0.75)
_MOST_TOKENS = 12
_HEAD, _INNER_HEAD = "eagle-target", "eagle-intermediate"
_ROUNDS = 400
_CLOSE = 1.03


@dataclass(frozen=True)
class Round:
    """What one gives (tokens) and takes (milliseconds)."""

    tokens: float
    milliseconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.milliseconds


def survival_of(rate: float, levels: int) -> list[float]:
    """Share of rounds accepted up to each place, where every place has the same acceptance."""
    return [rate**place for place in range(1, levels + 1)]


def hierarchy_costs(costs: Costs, ratio: float) -> Costs:
    """With an intermediate, and a head of its own, that cost `ratio` of what the target and its head do."""
    rows = {count: ratio * ms for count, ms in costs.rows_ms["target"].items()}
    head = costs.drafts[_HEAD]
    inner = DraftCost(ratio * head.first_ms, {width: ratio * ms for width, ms in head.level_ms.items()})
    return Costs({**costs.rows_ms, "intermediate": rows}, {**costs.drafts, _INNER_HEAD: inner})


def plain_round(costs: Costs) -> Round:
    return Round(1.0, costs.forward_ms("target", 1))


def eagle_round(costs: Costs, eagle: float) -> Round:
    """EAGLE over the target, by its best chain; plain decoding where no chain pays."""
    found = best_chain(costs, _HEAD, survival_of(eagle, 6))
    return max(Round(found.tokens, round_ms(costs, _HEAD, found)), plain_round(costs), key=lambda r: r.rate)


def inner_round(costs: Costs, eagle: float) -> Round:
    """The intermediate speculating with its own head, or without where that is faster."""
    as_target = Costs({"target": costs.rows_ms["intermediate"]}, {_HEAD: costs.drafts[_INNER_HEAD]})
    return eagle_round(as_target, eagle)


def cascade_round(costs: Costs, eagle: float, acceptance: float) -> Round:
    """The best length of the sequence draft that the intermediate writes for the target."""
    inner = inner_round(costs, eagle)
    rounds = []
    for length in range(1, _MOST_TOKENS + 1):
        # Whole inner rounds; on average the last one overshoots by half of what it gives beyond its first token.
        num_rounds = max(1.0, (length + (inner.tokens - 1) / 2) / inner.tokens)
        tokens = 1 + sum(survival_of(acceptance, length))
        rounds.append(Round(tokens, num_rounds * inner.milliseconds + costs.forward_ms("target", 1 + length)))
    return max(rounds, key=lambda r: r.rate)


def chosen_by_auto(sides: dict[str, Round], seed: int = 0) -> str:
    """The side that mode auto spends most rounds on, when rounds give whole tokens, at random, with these means."""
    rng, now = np.random.default_rng(seed), 0.0
    candidates = [Candidate(name, NoDrafter(), r.tokens, r.milliseconds) for name, r in sides.items()]
    drafter = AutoDrafter(candidates, clock=lambda: now)
    for _ in range(_ROUNDS):
        before = dict(drafter.choices)
        drafter.propose(0, [1, 2, 3], 9, SamplingParams(), 0)
        name = next(name for name, count in drafter.choices.items() if count > before[name])
        whole, part = divmod(sides[name].tokens, 1.0)
        now += sides[name].milliseconds / 1e3
        drafter.commit(0, [7] * (int(whole) + int(rng.random() < part)), None)
    return max(drafter.choices, key=lambda name: drafter.choices[name])


def cell(costs: Costs, eagle: float, ratio: float, acceptance: float) -> dict[str, Any]:
    """Both sides over plain decoding, and what auto chooses of plain, EAGLE and cascade."""
    all_costs = hierarchy_costs(costs, ratio)
    sides = {
        "plain": plain_round(all_costs),
        "eagle": eagle_round(all_costs, eagle),
        "cascade": cascade_round(all_costs, eagle, acceptance),
    }
    plain = sides["plain"].rate
    best, second = sorted((side.rate for side in sides.values()), reverse=True)[:2]
    return {
        "ratio": ratio,
        "acceptance": acceptance,
        "eagle_speedup": round(sides["eagle"].rate / plain, 3),
        "cascade_speedup": round(sides["cascade"].rate / plain, 3),
        "cascade_over_eagle": round(sides["cascade"].rate / sides["eagle"].rate, 3),
        "auto_is_right": None if best < _CLOSE * second else sides[chosen_by_auto(sides)].rate == best,
    }


def measure_target(path: Path) -> tuple[Costs, dict[str, Any]]:
    """T(rows) of the bundle's target and the costs of its head's drafts. Raises ValueError where it has no head."""
    bundle = Bundle.open(path)
    session = Session.open(bundle)
    factory = DrafterFactory(bundle, session.backend, "cpu", None)
    factory.make("eagle")
    drafts = {_HEAD: measure_drafts(factory.head(_HEAD), session.backend, session.backend.shape.hidden_size)}
    costs = Costs({"target": measure_rows(session.backend)}, drafts)
    return costs, fingerprint(shared_runtime(None))


def make_maps(costs: Costs, eagles: Sequence[float]) -> list[dict[str, Any]]:
    """One map for each acceptance of EAGLE's."""
    return [
        {"eagle": eagle, "cells": [cell(costs, eagle, ratio, a) for a in ACCEPTANCES for ratio in COST_RATIOS]}
        for eagle in eagles
    ]


def show(found: dict[str, Any]) -> None:
    cells = found["cells"]
    print(f"\nEAGLE accepts {found['eagle']:.2f} a place ({cells[0]['eagle_speedup']:.2f}× plain decoding).")
    print("Cascade over EAGLE, by the intermediate's cost (across) and acceptance (down):")
    print("      " + "".join(f"{ratio:7.2f}" for ratio in COST_RATIOS))
    for acceptance in ACCEPTANCES:
        line = [c for c in cells if c["acceptance"] == acceptance]
        print(f"{acceptance:6.2f}" + "".join(f"{c['cascade_over_eagle']:7.2f}" for c in line))
    judged = [c["auto_is_right"] for c in cells if c["auto_is_right"] is not None]
    print(f"auto takes the better side in {sum(judged)} of {len(judged)} cells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="its target and head are measured")
    parser.add_argument("--costs", type=Path, help="instead of a bundle: a file that on_clock takes too")
    parser.add_argument("--eagle", default=",".join(map(str, _EAGLE)), help="EAGLE's acceptance a place, several")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.bundle is None) == (arguments.costs is None):
        parser.error("give a bundle, or --costs, and not both")
    costs, machine = read_stated(arguments.costs) if arguments.costs else measure_target(arguments.bundle)
    one = costs.forward_ms("target", 1)
    print("T(rows)/T(1): " + "  ".join(f"{n}: {ms / one:.2f}" for n, ms in costs.rows_ms["target"].items()))
    maps = make_maps(costs, [float(part) for part in arguments.eagle.split(",")])
    for found in maps:
        show(found)
    name = arguments.bundle.name if arguments.bundle else None
    result = {"machine": machine, "bundle": name, "costs": costs.to_json(), "maps": maps}
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
