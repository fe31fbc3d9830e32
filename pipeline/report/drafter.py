"""What the report, the model card and the terminal tell of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.formats.eagle_record import Acceptance, TrainingRecord


@dataclass(frozen=True)
class DrafterFacts:
    """One drafter of the bundle.

    feature_layers: whose states it reads; none for a language model. num_bytes: of its files. loss: (tokens trained on,
    mean loss since the point before); tau: (tokens trained on, τ held out), and over hours of training where time was
    the budget. example: one generated conversation in pieces, each with whether the drafter learned from it, because
    the target wrote it.
    """

    role: str
    draft_vocab_size: int
    feature_layers: Sequence[int]
    training: TrainingRecord
    num_parameters: int
    num_bytes: int
    loss: Sequence[tuple[float, float]]
    tau: Sequence[tuple[float, float]]
    tau_by_hours: Sequence[tuple[float, float]]
    example: Sequence[tuple[str, bool]]


def summary_line(role: str, acceptance: Acceptance, num_bytes: int) -> str:
    """E.g. `eagle-target  τ 1.90 at 4 drafted tokens (held-out, greedy) · acceptance .45/.25/.15/.10 · 5.1 MB`."""
    num_drafted = len(acceptance.by_position)
    return (
        f"{role}  τ {acceptance.tau:.2f} at {num_drafted} drafted tokens (held-out, greedy)"
        f" · acceptance {format_shares(acceptance)} · {num_bytes / 1e6:.1f} MB"
    )


def format_shares(acceptance: Acceptance) -> str:
    """Acceptance by position, e.g. `.45/.25/.15/.10`."""
    return "/".join(f"{share:.2f}".removeprefix("0") for share in acceptance.by_position)


def rows(facts: DrafterFacts) -> list[tuple[str, str]]:
    """What one table of the report says, as (name, value)."""
    training = facts.training
    reads = ", ".join(map(str, facts.feature_layers))
    return [
        ("τ, tokens a call of the target, as served", f"{training.served.tau:.3f}"),
        ("acceptance by position, as served", " / ".join(f"{share:.3f}" for share in training.served.by_position)),
        ("weights as served", training.served_form),
        ("τ with the weights as trained", f"{training.plain.tau:.3f}"),
        ("MBSU", f"{training.mbsu:.2f} at a cost of {training.cost_ratio:.1%} of the bytes of the model above"),
        ("draft vocabulary", f"{facts.draft_vocab_size} tokens"),
        *([("reads what enters layers", reads)] if reads else []),
        ("trained on", f"{training.tokens:,} tokens" + (f" in {training.seconds:.0f} s" if training.seconds else "")),
        ("size", f"{facts.num_bytes / 1e6:.1f} MB, {facts.num_parameters / 1e6:.2f} M parameters"),
    ]
