"""The drafter's part of export: refuse a head that is worth nothing, and tell of any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.graph import BuildContext
from pipeline.stages.eagle import HISTORY

if TYPE_CHECKING:
    from pipeline.report.drafter import DrafterFacts

ROLE = "eagle-target"
SAMPLE = "sample.txt"
EXAMPLE_CHARACTERS = 2400


def drafter_facts(context: BuildContext, bundle: Path) -> DrafterFacts:
    """Facts of the head at `bundle / ROLE`, beside the target, for report and card.

    Raises ValueError when its acceptance has collapsed, and FormatError when it does not fit the target. (That it was
    trained on this very target and tokenizer is checked with the manifest: deploy.formats.components.)
    """
    from deploy.formats.model_dir import ModelDirectory
    from deploy.formats.speculators import EagleDirectory
    from pipeline.report.drafter import DrafterFacts

    source = context.inputs[ROLE]
    with ModelDirectory.open(bundle / "target") as target:
        shape = target.shape
    with EagleDirectory.open(bundle / ROLE, shape) as head:
        require_worth(head.training.served.by_position[0], context.config["min_acceptance"])
        history = json.loads((source / HISTORY).read_text(encoding="utf-8"))
        return DrafterFacts(
            role=ROLE,
            config=head.config,
            training=head.training,
            num_parameters=head.num_parameters(),
            num_bytes=sum(file.stat().st_size for file in (bundle / ROLE).iterdir()),
            loss=[(point["tokens"], point["loss"]) for point in history["training"]],
            tau=[(point["tokens"], point["metrics"]["tau"]) for point in history["evaluations"]],
            example=_example(context.inputs["generate"] / SAMPLE),
        )


def require_worth(first_acceptance: float, min_acceptance: float) -> None:
    """Raises ValueError when the first drafted token is accepted so seldom that something must have gone wrong."""
    if first_acceptance < min_acceptance:
        raise ValueError(
            f"eagle-target: its first drafted token is accepted {first_acceptance:.3f} of the time, below"
            f" eagle.min_acceptance={min_acceptance}; train longer (eagle.train.max_seconds), generate more"
            " (generate.num_tokens), look at the loss in metrics.jsonl, or leave the drafter out (eagle=none)"
        )


def _example(sample_file: Path) -> list[tuple[str, bool]]:
    """generate's sample in pieces, each with whether it was learned from: there it stands between ⟦ and ⟧."""
    pieces = re.split("[⟦⟧]", sample_file.read_text(encoding="utf-8")[:EXAMPLE_CHARACTERS])
    return [(piece, bool(number % 2)) for number, piece in enumerate(pieces) if piece]
