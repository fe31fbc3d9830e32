"""`deploy tune`: what this machine takes for a bundle's forwards and drafts, and what mode auto makes of it."""

from __future__ import annotations

from deploy.commands import options as o
from deploy.commands.bench_tables import rows_table, table, wide_console
from deploy.commands.opening import chosen_backend
from deploy.formats.bundle import Bundle
from deploy.runtime.auto_mode import auto_drafter, costs_path, machine_costs
from deploy.runtime.costs import DRAFT_WIDTHS, Costs, read_costs
from deploy.runtime.drafters.auto import Candidate
from deploy.runtime.modes import DrafterFactory
from deploy.runtime.session import Session


def tune(bundle: o.BundlePath, device: o.Device = "auto", threads: o.Threads = None) -> None:
    """Measure again what decides mode auto's choices, keep it in the user's cache and show it."""
    opened = Bundle.open(bundle)
    computing = chosen_backend(device, None, opened)
    session = Session.open(opened, backend=computing, threads=threads)
    factory = DrafterFactory(opened, session.backend, computing, threads)
    costs = machine_costs(factory, is_fresh=True)
    console = wide_console()
    console.print(rows_table(costs.rows_ms))
    if costs.drafts:
        console.print(_drafts_table(costs))
    console.print(_candidates_table(auto_drafter(factory, costs).candidates))
    console.print(_where_kept(factory, costs))


def _where_kept(factory: DrafterFactory, costs: Costs) -> str:
    try:
        path = costs_path(factory)
    except RuntimeError:  # `machine_costs` has said why
        return "not kept: there is no cache"
    found = read_costs(path)
    is_kept = found is not None and found.to_json() == costs.to_json()  # an older file may lie there, read-only
    return f"kept in {path}" if is_kept else "not kept: the cache cannot be written"


def _drafts_table(costs: Costs) -> object:
    columns = ["first level", *(f"each further one of {width}" for width in DRAFT_WIDTHS)]
    made = table("Milliseconds of a draft", "model", *columns)
    for name, cost in costs.drafts.items():
        levels = (cost.milliseconds(2, width) - cost.first_ms for width in DRAFT_WIDTHS)
        made.add_row(name, f"{cost.first_ms:.3f}", *(f"{level:.3f}" for level in levels))
    return made


def _candidates_table(candidates: tuple[Candidate, ...]) -> object:
    made = table("Candidates of mode auto, as predicted", "candidate", "tok/s", "x plain", "τ", "round ms", "sizes")
    plain = next(found for found in candidates if found.name == "plain")
    for found in candidates:
        rate, alone = (1e3 * each.tokens / each.milliseconds for each in (found, plain))
        numbers = (f"{rate:.1f}", f"{rate / alone:.2f}x", f"{found.tokens:.2f}", f"{found.milliseconds:.2f}")
        made.add_row(found.name, *numbers, _sizes(found))
    return made


def _sizes(candidate: Candidate) -> str:
    limits = getattr(candidate.drafter, "limits", None)
    if candidate.match_length is not None:
        return f"where the last {candidate.match_length} tokens occurred before"
    if limits is None:
        return ""
    sizes = f"depth {limits.depth}, width {limits.width}, nodes {limits.num_nodes}"
    least = getattr(candidate.drafter, "worth", limits.min_probability)
    return f"{sizes}, while likelier than {least:.2f}" if least else sizes
