"""plan.json: what a bundle's modes gave on held-out text, and the costs of the machine on which they did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.formats.bundle import Bundle
from deploy.formats.errors import BundleError
from deploy.runtime.costs import Costs
from deploy.runtime.modes import MODES, Mode
from deploy.runtime.plan import Expectation

PLAN = "plan.json"
VERSION = 1
MODE_KEYS = (
    "tau",
    "survival",
    "acceptance_by_position",
    "nodes_per_round",
    "levels_per_round",
    "width",
    "decode_tok_s",
    "predicted_tok_s",
)
"""Of a measurement's mode; `draft_ms` is its `round_ms.draft`."""


@dataclass(frozen=True)
class PlanFile:
    """machine: where it was measured. modes: as the file holds them. choice: the mode with most tokens per second."""

    machine: Mapping[str, Any]
    costs: Costs
    modes: Mapping[Mode, Mapping[str, Any]]
    choice: Mode

    def expectations(self) -> dict[Mode, Expectation]:
        """What the modes' rounds were like."""
        return {mode: Expectation.from_json(found) for mode, found in self.modes.items()}


def make_plan(result: Mapping[str, Any], costs: Costs) -> dict[str, Any]:
    """plan.json's content, from a measurement (deploy/runtime/benchmark.py)."""
    modes = {}
    for mode, found in result["modes"].items():
        draft_ms = found["round_ms"]["draft"] if found["round_ms"] else None
        modes[mode] = {key: found[key] for key in MODE_KEYS} | {"draft_ms": draft_ms}
    choice = max(modes, key=lambda mode: modes[mode]["decode_tok_s"] or 0.0)
    machine = {"machine": result["machine"], "costs": costs.to_json()}
    return {"version": VERSION, **machine, "modes": modes, "choice": choice}


def read_plan_file(bundle: Bundle) -> PlanFile | None:
    """The bundle's plan; None where it has none. Raises BundleError for a malformed or newer one."""
    if PLAN not in bundle.manifest.files:
        return None
    path = bundle.path / PLAN
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise BundleError(f"{path}: version {raw['version']!r} is not this program's {VERSION}; update understudy")
        found = PlanFile(dict(raw["machine"]), Costs.from_json(raw["costs"]), dict(raw["modes"]), raw["choice"])
        if not set(found.modes) <= set(MODES) or found.choice not in found.modes:
            raise ValueError(f"modes {', '.join(map(str, found.modes))}, choice {found.choice!r}")
        found.expectations()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: is not a plan as docs/bundle-format.md describes it ({error!r})") from error
    return found
