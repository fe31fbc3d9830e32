"""Mode auto: candidates, with what this machine's costs and known acceptance promise of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.formats.bundle import MANIFEST, Bundle
from deploy.formats.digest import sha256_file
from deploy.kernels.cpu.library import library_path
from deploy.runtime.costs import CONTEXT, Costs, cache_path, measure_drafts, measure_rows, read_costs, write_costs
from deploy.runtime.drafters.auto import AutoDrafter, Candidate
from deploy.runtime.drafters.base import DraftModel
from deploy.runtime.drafters.confident import ConfidentDrafter
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.drafters.model import EagleDrafter
from deploy.runtime.machine import describe_device
from deploy.runtime.modes import DrafterFactory, DraftOptions, Mode, available_modes
from deploy.runtime.plan import MOST_LEVELS, Expectation, best_chain, best_lookups, round_ms, worth_of_row
from deploy.runtime.plan_file import read_plan_file
from deploy.runtime.tree import TreeLimits

_logger = logging.getLogger(__name__)
DRAFTING_MODEL: dict[Mode, str] = {
    "chain": "intermediate",
    "eagle": "eagle-target",
    "eagle-tree": "eagle-target",
    "opt-tree": "eagle-target",
}
"""Whose levels a mode's drafts are; a cascade's are of several models."""
_DRAFT_ROOM = 32
"""Tokens of a short context that are left for the drafts that are timed."""
_LIMITS = TreeLimits(depth=MOST_LEVELS, width=3, num_nodes=8)
INTERMEDIATE_MODES: tuple[Mode, ...] = ("chain", "cascade", "cascade-lookup")
"""Uses of the intermediate, one of which auto takes: of these alone it has to know how they went."""
_HOPEFUL = 0.8
"""An intermediate that promises less than this share of what goes without it is not loaded: kinds of text differ, but
its memory, and its reading of every prompt, are certain."""


def costs_path(factory: DrafterFactory) -> Path:
    """Where the bundle's costs here are kept: a build of the native library has its own. Raises as `cache_path`."""
    library = library_path()
    device = describe_device(factory.target) | {"library": sha256_file(library) if library.is_file() else None}
    return cache_path(sha256_file(factory.bundle.path / MANIFEST), device)


def machine_costs(factory: DrafterFactory, *, is_fresh: bool = False) -> Costs:
    """Costs of the bundle's models here: read from the user's cache, or measured now and written there.

    is_fresh: measure in any case. A cache that cannot be written is one warning.
    """
    try:
        path = costs_path(factory)
    except RuntimeError as error:  # a user without a home
        _logger.warning("measured costs are not kept (%s; set XDG_CACHE_HOME to a directory)", error)
        return measure_costs(factory)
    known = None if is_fresh else read_costs(path)
    if known is not None:
        return known
    costs = measure_costs(factory)
    try:
        write_costs(path, costs)
    except OSError as error:
        _logger.warning("%s: measured costs are not kept (%s)", path, error.strerror)
    return costs


def measure_costs(factory: DrafterFactory) -> Costs:
    """Times every model of the bundle; seconds."""
    rows, drafts = {"target": measure_rows(factory.target)}, {}
    roles = {component.role for component in factory.bundle.manifest.components}
    shape = factory.target.shape
    context = max(1, min(CONTEXT, shape.context_length - _DRAFT_ROOM))
    if "intermediate" in roles:
        model = factory.language_model("intermediate")
        rows["intermediate"] = measure_rows(model)
        assert isinstance(model, DraftModel)
        drafts["intermediate"] = measure_drafts(model, factory.target, model.shape.hidden_size, context=context)
    for role, above in (("eagle-target", "target"), ("eagle-intermediate", "intermediate")):
        if role in roles:
            hidden_size = (shape if above == "target" else factory.language_model(above).shape).hidden_size
            drafts[role] = measure_drafts(factory.head(role), factory.target, hidden_size, context=context)
    return Costs(rows, drafts)


def read_plan(bundle: Bundle) -> dict[Mode, Expectation]:
    """What the bundle's plan says of each mode; empty where it has none. Raises BundleError for a malformed one."""
    found = read_plan_file(bundle)
    return {} if found is None else found.expectations()


def auto_drafter(
    factory: DrafterFactory,
    costs: Costs,
    measured: Mapping[Mode, Expectation] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> AutoDrafter:
    """All that the bundle can do, "plain" included; of several uses of the intermediate the most promising one, unless
    that has no hope.

    measured: what the modes' rounds are like; None: what the bundle's plan says. Of an intermediate for which that has
    nothing, its own training record says what a chain of its drafts is worth. clock: of seconds, for rounds.
    """
    bundle = factory.bundle
    if measured is None:
        measured = read_plan(bundle)
    modes = available_modes(bundle)
    candidates = [Candidate("plain", factory.make("plain"), 1.0, costs.forward_ms("target", 1), is_certain=True)]
    candidates += _lookups(costs)
    if "eagle" in modes:
        candidates.append(_head(factory, costs))
    known = {mode: measured[mode] for mode in INTERMEDIATE_MODES if mode in measured}
    use = _intermediate(factory, costs, known, modes)
    if use is not None:
        mode, options, expected, milliseconds = use
        best = max(c.tokens / c.milliseconds for c in candidates if c.match_length is None)
        if expected.tokens / milliseconds >= _HOPEFUL * best:
            candidates.append(Candidate(mode, factory.make(mode, options), expected.tokens, milliseconds))
    few_rows = {rows: ms for rows, ms in costs.rows_ms["target"].items() if rows <= 1 + _LIMITS.num_nodes}
    return AutoDrafter(candidates, few_rows, clock=clock)


def _intermediate(
    factory: DrafterFactory, costs: Costs, measured: Mapping[Mode, Expectation], modes: Sequence[Mode]
) -> tuple[Mode, DraftOptions | None, Expectation, float] | None:
    """The most promising use of the intermediate, with its sizes and a round's milliseconds; None without one.

    Where no plan has measured any, that is the best chain by how the intermediate's drafts were accepted when it was
    made, which is all that is known.
    """
    possible = {mode: expected for mode, expected in measured.items() if mode in modes}
    if possible:
        times = {mode: _planned_ms(costs, mode, expected) for mode, expected in possible.items()}
        mode = max(possible, key=lambda mode: possible[mode].tokens / times[mode])
        return mode, None, possible[mode], times[mode]
    if "chain" not in modes or "intermediate" not in costs.drafts:
        return None
    known = factory.bundle.component("intermediate").drafter
    assert known is not None
    expected = best_chain(costs, "intermediate", known.acceptance.by_position)
    milliseconds = round_ms(costs, "intermediate", expected)
    return "chain", DraftOptions(depth=round(expected.levels)), expected, milliseconds


def _lookups(costs: Costs) -> list[Candidate]:
    """One for each length of a match, longer ones first."""
    expected = best_lookups(costs)
    drafter = LookupDrafter({length: round(found.nodes) for length, found in expected.items()})
    return [
        Candidate(f"lookup-{length}", drafter, found.tokens, round_ms(costs, None, found), match_length=length)
        for length, found in sorted(expected.items(), reverse=True)
    ]


def _head(factory: DrafterFactory, costs: Costs) -> Candidate:
    """A tree whose size follows the head's confidence. It gives no less than the best chain, which is what is known."""
    head = factory.make("eagle")
    assert isinstance(head, EagleDrafter)
    known = factory.bundle.component("eagle-target").drafter
    assert known is not None
    expected = best_chain(costs, "eagle-target", known.acceptance.by_position)
    drafter = ConfidentDrafter(head, _LIMITS, worth_of_row(costs, "eagle-target", expected))
    milliseconds = round_ms(costs, "eagle-target", expected)
    return Candidate("eagle", drafter, expected.tokens, milliseconds)


def _planned_ms(costs: Costs, mode: Mode, expected: Expectation) -> float:
    return round_ms(costs, DRAFTING_MODEL.get(mode), expected)
