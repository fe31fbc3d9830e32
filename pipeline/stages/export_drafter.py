"""The drafters' part of export: refuse one that is worth nothing, and tell of any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages.eagle import HISTORY

if TYPE_CHECKING:
    from deploy.formats.components import Component
    from deploy.formats.eagle_record import TrainingRecord
    from pipeline.report.drafter import DrafterFacts

CONFIGS = {"eagle-target": "eagle", "intermediate": "intermediate", "eagle-intermediate": "eagle_intermediate"}
"""Role in the bundle → its part of the configuration."""
REMEDIES = {
    "eagle-target": "eagle.train.max_seconds",
    "intermediate": "intermediate.align.train.max_seconds",
    "eagle-intermediate": "eagle_intermediate.train.max_seconds",
}
OFF = {"eagle_intermediate": "eagle@eagle_intermediate=none"}
SAMPLE = "sample.txt"
EXAMPLE_CHARACTERS = 2400

Points = list[tuple[float, float]]


def drafters_facts(context: BuildContext, bundle: Path) -> list[DrafterFacts]:
    """Facts of every drafter in `bundle`, for report and card.

    Raises ValueError when the acceptance of one has collapsed, and FormatError when it does not fit the model that it
    drafts for. (That it was trained for this very model and tokenizer is checked with the manifest.)
    """
    from deploy.formats.components import DRAFTER_ROLES

    found = [_facts(context, bundle, role) for role in DRAFTER_ROLES if role in context.inputs]
    return sorted(found, key=lambda facts: list(CONFIGS).index(facts.role))


def _facts(context: BuildContext, bundle: Path, role: str) -> DrafterFacts:
    from pipeline.report.drafter import DrafterFacts

    item, training = _describe(bundle, role)
    assert item.drafter is not None
    require_worth(role, training.served.by_position[0], context.config["min_acceptance"][role])
    loss, tau, tau_by_hours = _curves(json.loads((context.inputs[role] / HISTORY).read_text(encoding="utf-8")))
    return DrafterFacts(
        role=role,
        draft_vocab_size=item.drafter.draft_vocab_size,
        feature_layers=item.drafter.feature_layers,
        training=training,
        num_parameters=item.num_parameters,
        num_bytes=item.num_bytes,
        loss=loss,
        tau=tau,
        tau_by_hours=tau_by_hours,
        example=_example(context.inputs["generate"] / SAMPLE),
    )


def _describe(bundle: Path, role: str) -> tuple[Component, TrainingRecord]:
    """The drafter as the manifest will describe it, and its record."""
    from deploy.formats.components import describe_components
    from deploy.formats.digest import sha256_file
    from deploy.formats.eagle_record import parse_record
    from deploy.formats.model_dir import read_json
    from deploy.formats.speculators import RECORD_FILE

    paths = {name: name for name in ("target", "intermediate") if (bundle / name).is_dir()} | {role: role}
    files = (file for path in paths for file in (bundle / path).iterdir())
    digests = {file.relative_to(bundle).as_posix(): sha256_file(file) for file in (*files, bundle / "tokenizer.json")}
    described = dict(zip(paths, describe_components(bundle, paths, digests), strict=True))[role]
    if isinstance(described, ValueError):
        raise described
    return described, parse_record(read_json(bundle / role / RECORD_FILE))[1]


def _curves(history: dict[str, Any]) -> tuple[Points, Points, Points]:
    """(tokens trained on, loss), (tokens, τ) and (hours trained, τ); phases, where there are several, one after the
    other. No hours where time was not the budget."""
    phases = [history] if "training" in history else list(history.values())
    loss, tau, tau_by_hours = Points(), Points(), Points()
    before, hours_before = 0.0, 0.0
    for phase in phases:
        loss += [(before + point["tokens"], point["loss"]) for point in phase["training"]]
        tau += [(before + point["tokens"], point["metrics"]["tau"]) for point in phase["evaluations"]]
        for point in phase["evaluations"]:
            if point["seconds"] is not None:
                tau_by_hours.append((hours_before + point["seconds"] / 3600, point["metrics"]["tau"]))
        before = tau[-1][0]
        hours_before = tau_by_hours[-1][0] if tau_by_hours else 0.0
    return loss, tau, tau_by_hours


def require_worth(role: str, first_acceptance: float, min_acceptance: float) -> None:
    """Raises ValueError when the first drafted token is accepted so seldom that something must have gone wrong."""
    if first_acceptance < min_acceptance:
        key = CONFIGS[role]
        raise ValueError(
            f"{role}: its first drafted token is accepted {first_acceptance:.3f} of the time, below"
            f" {key}.min_acceptance={min_acceptance}; train longer ({REMEDIES[role]}), generate more"
            " (generate.num_tokens), look at the loss in metrics.jsonl, or leave the drafter out"
            f" ({OFF.get(key, f'{key}=none')})"
        )


def _example(sample_file: Path) -> list[tuple[str, bool]]:
    """generate's sample in pieces, each with whether it was learned from: there it stands between ⟦ and ⟧."""
    pieces = re.split("[⟦⟧]", sample_file.read_text(encoding="utf-8")[:EXAMPLE_CHARACTERS])
    return [(piece, bool(number % 2)) for number, piece in enumerate(pieces) if piece]
