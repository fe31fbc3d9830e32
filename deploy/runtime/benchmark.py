"""A bundle's modes measured side by side on prompts: what docs/bundle-format.md calls a measurement.

Each prompt is answered by every mode in turn, so that whatever else the machine does meets all of them; who begins
moves on by one from prompt to prompt. Caches are emptied in between. The target alone is always among them: every
other mode's tokens are compared with its.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.runtime.auto_mode import DRAFTING_MODEL, auto_drafter, measure_costs
from deploy.runtime.costs import Costs, measure_rows
from deploy.runtime.drafters.auto import AutoDrafter
from deploy.runtime.drafters.base import Drafter
from deploy.runtime.drafters.model import EagleDrafter, LanguageModelDrafter
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.machine import describe_machine
from deploy.runtime.measure import Answer, acceptance_json, answer_all, count_identical, counts_of, rates, round_parts
from deploy.runtime.modes import NEEDS, DrafterFactory, DraftOptions, Mode
from deploy.runtime.plan import Expectation, chain_expectation, tokens_per_second
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.session import Session
from deploy.runtime.synthetic import SyntheticDrafter, rates_survival
from deploy.runtime.tree import TreeLimits

SYNTHETIC_MODES: tuple[Mode, ...] = ("chain", "eagle")
"""Modes whose drafting costs can be had without their acceptance."""
NO_DRAFTER = "none"
"""The name of synthetic drafts that cost nothing to make."""


@dataclass(frozen=True)
class BenchRequest:
    """modes: in the order of the result; "plain" is measured in any case. repeats: passes over all prompts.

    synthetic: acceptance by position given that of the positions before; empty: no synthetic drafts. costs: of the
    bundle's models here; None: measured before the first answer. expected: what mode auto is to know of the others;
    None: what the bundle's plan says.
    """

    modes: Sequence[Mode]
    records: Sequence[PromptRecord]
    options: GenerationOptions
    repeats: int = 1
    synthetic: Sequence[float] = ()
    costs: Costs | None = None
    expected: Mapping[Mode, Expectation] | None = None


def bench(
    session: Session, factory: DrafterFactory, request: BenchRequest, begin: Callable[[int], Callable[[], None]]
) -> tuple[dict[str, Any], Costs]:
    """The measurement as docs/bundle-format.md describes it, without the bundle's name; and the costs behind it.

    begin: called with the number of answers before the first one; returns what is called after each. Raises ValueError
    for a mode that the bundle lacks models for, and for a record whose conversation does not fit the context.
    """
    machine = describe_machine(getattr(session.backend, "runtime", None))
    machine |= getattr(session.backend, "device_facts", {})
    costs = request.costs or costs_for(factory, request.modes)
    entries = make_entries(factory, request.modes, costs, request.expected)
    seed = request.options.sampling.seed
    synthetic = make_synthetic(factory, request.modes, request.synthetic, seed) if request.synthetic else []
    num_turns = sum(max(len(record.turns), 1) for record in request.records)
    on_answer = begin(num_turns * request.repeats * (len(entries) + len(synthetic)))
    arguments = (session, entries, request.records, request.options)
    run(*arguments, synthetic=synthetic, repeats=request.repeats, on_answer=on_answer)
    measured = costs.to_json()
    result = {
        "machine": machine,
        "rows_ms": measured["rows_ms"],
        "drafts_ms": measured["drafts"],
        "repeats": request.repeats,
        "modes": mode_results(entries, costs),
    }
    if synthetic:
        result["synthetic"] = synthetic_results(synthetic, entries[0], request.synthetic, costs)
    return result, costs


@dataclass
class Entry:
    """One way to decode, and what came of it.

    drafting_model: role of the model whose levels its drafts are, None where there is no such one. models: role →
    every model that it runs, the target first. passes: its answers, pass by pass in the order of the prompts.
    """

    name: str
    drafter: Drafter
    drafting_model: str | None
    models: Mapping[str, Any]
    passes: list[list[Answer]] = field(default_factory=list)
    cache_bytes: dict[str, int] = field(default_factory=dict)

    def answer(
        self, session: Session, record: PromptRecord, options: GenerationOptions, on_answer: Callable[[], None]
    ) -> None:
        """All turns of one record, from empty caches."""
        session.use(self.drafter)
        self.passes[-1] += answer_all(session, [record], options, on_answer)
        for role, model in self.models.items():
            if (used := getattr(model, "cache_bytes", None)) is not None:
                self.cache_bytes[role] = max(self.cache_bytes.get(role, 0), int(used))

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of weights and of the largest cache, by model, where the backend tells."""
        sizes = {role: getattr(model, "weight_bytes", None) for role, model in self.models.items()}
        return {
            role: {"weight_bytes": int(size), "cache_bytes": self.cache_bytes.get(role, 0)}
            for role, size in sizes.items()
            if size is not None
        }


def costs_for(factory: DrafterFactory, modes: Sequence[Mode]) -> Costs:
    """Measured now: of all models where one of `modes` may draft with one, of the target alone otherwise."""
    if any(mode == "auto" or NEEDS[mode] for mode in modes):
        return measure_costs(factory)
    return Costs({"target": measure_rows(factory.target)}, {})


def make_entries(
    factory: DrafterFactory, modes: Sequence[Mode], costs: Costs, expected: Mapping[Mode, Expectation] | None = None
) -> list[Entry]:
    """One for each mode, "plain" first in any case. Raises ValueError for a mode that the bundle lacks models for."""
    entries = []
    for mode in dict.fromkeys(("plain", *modes)):
        drafter = auto_drafter(factory, costs, expected) if mode == "auto" else factory.make(mode)
        names = drafter.choices if isinstance(drafter, AutoDrafter) else (mode,)
        roles = dict.fromkeys(role for name, needs in NEEDS.items() if name in names for role in needs)
        entries.append(Entry(mode, drafter, DRAFTING_MODEL.get(mode), _models(factory, roles)))
    return entries


def make_synthetic(
    factory: DrafterFactory, modes: Sequence[Mode], acceptance: Sequence[float], seed: int
) -> list[Entry]:
    """Drafts that cost nothing to make, and of the measured modes those whose costs can be had."""
    vocab_size, levels = factory.target.shape.vocab_size, len(acceptance)
    entries = [Entry(NO_DRAFTER, SyntheticDrafter(acceptance, vocab_size, seed=seed), None, _models(factory, ()))]
    for mode in (mode for mode in SYNTHETIC_MODES if mode in modes):
        inner = factory.make(mode, DraftOptions(depth=levels, width=1))
        assert isinstance(inner, EagleDrafter | LanguageModelDrafter)
        inner.limits = TreeLimits(levels, 1, levels)  # whatever the model thinks of its drafts
        drafter = SyntheticDrafter(acceptance, vocab_size, inner=inner, seed=seed)
        entries.append(Entry(mode, drafter, DRAFTING_MODEL[mode], _models(factory, NEEDS[mode])))
    return entries


def _models(factory: DrafterFactory, roles: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"target": factory.target}
    for role in roles:
        found[role] = factory.head(role) if role.startswith("eagle-") else factory.language_model(role)
    return found


def run(
    session: Session,
    entries: Sequence[Entry],
    records: Sequence[PromptRecord],
    options: GenerationOptions,
    *,
    synthetic: Sequence[Entry] = (),
    repeats: int = 1,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Answer all prompts by all entries, `repeats` times. synthetic: entries that are told the first entry's answers.

    Raises ValueError naming the record whose conversation does not fit the context.
    """
    for number in range(repeats):
        for entry in (*entries, *synthetic):
            entry.passes.append([])
        for place, record in enumerate(records):
            first = (number + place) % len(entries)
            for entry in (*entries[first:], *entries[:first]):
                entry.answer(session, record, options, on_answer)
            known = [(*a.prompt, *a.result.token_ids) for a in entries[0].passes[-1] if a.record is record]
            for entry in synthetic:
                assert isinstance(entry.drafter, SyntheticDrafter)
                entry.drafter.tell(known)
                entry.answer(session, record, options, on_answer)


def mode_results(entries: Sequence[Entry], costs: Costs) -> dict[str, dict[str, Any]]:
    """Name → figures of all answers, with those of each category; the first entry is the target alone."""
    return {entry.name: _whole(entry, entries[0], lambda e, p: _measured(e, p, costs)) for entry in entries}


def synthetic_results(
    entries: Sequence[Entry], plain: Entry, acceptance: Sequence[float], costs: Costs
) -> dict[str, Any]:
    """What the synthetic drafts gave, beside what the cost model says of the same acceptance."""

    def predicted(entry: Entry, _passes: Sequence[Sequence[Generation]]) -> dict[str, Any]:
        expected = chain_expectation(rates_survival(acceptance), len(acceptance))
        return {"predicted_tok_s": round(tokens_per_second(costs, entry.drafting_model, expected), 2)}

    return {"acceptance": list(acceptance), "modes": {entry.name: _whole(entry, plain, predicted) for entry in entries}}


_More = Callable[[Entry, Sequence[Sequence[Generation]]], dict[str, Any]]


def _whole(entry: Entry, plain: Entry, more: _More) -> dict[str, Any]:
    categories = dict.fromkeys(answer.record.category for answer in entry.passes[0])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    memory = {"peak_rss_mb": round(peak_mb, 1), "memory": entry.memory()}
    result = _figures(entry, plain, more, None) | memory
    if isinstance(entry.drafter, AutoDrafter):
        rounds = sum(entry.drafter.choices.values())
        result["choices"] = {name: round(count / rounds, 4) for name, count in entry.drafter.choices.items() if rounds}
    return result | {"by_category": {category: _figures(entry, plain, more, category) for category in categories}}


def _figures(entry: Entry, plain: Entry, more: _More, category: str | None) -> dict[str, Any]:
    """Of one category, or of all answers."""

    def chosen(answers: Sequence[Answer]) -> list[Generation]:
        return [answer.result for answer in answers if category in (None, answer.record.category)]

    passes = [chosen(one) for one in entry.passes]
    return {
        **rates(passes),
        **acceptance_json(counts_of(passes)),
        **more(entry, passes),
        "round_ms": round_parts(passes),
        "identical_to_plain": count_identical(passes, chosen(plain.passes[0])),
    }


def _measured(entry: Entry, passes: Sequence[Sequence[Generation]], costs: Costs) -> dict[str, Any]:
    counts = counts_of(passes)
    drafter, role = entry.drafter, entry.drafting_model
    width = drafter.limits.width if isinstance(drafter, EagleDrafter | LanguageModelDrafter) else 1
    expected = Expectation.of(counts, width=width, has_model=role is not None)
    return {
        "width": width,
        "predicted_tok_s": round(tokens_per_second(costs, role, expected), 2) if counts.rounds else None,
        "mbsu": _mbsu(entry, counts.tau, expected.nodes),
    }


def _mbsu(entry: Entry, tau: float, nodes: float) -> float | None:
    """Memory-bound speed-up (arXiv 2411.11055): τ / (c·γ + 1), c the drafter's bytes over the target's as served."""
    if entry.drafting_model is None:
        return None
    drafter, target = (getattr(entry.models.get(role), "read_bytes", None) for role in (entry.drafting_model, "target"))
    if drafter is None or target is None:
        return None
    share = drafter / target
    return round(tau / (share * nodes + 1), 4)
