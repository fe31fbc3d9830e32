"""The quality table: a row per method, three figures per kind of held-out text; terminal, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("perplexity", "kl", "agreement")
HEADINGS = {"perplexity": "ppl", "kl": "KL", "agreement": "top-1"}
FORMATS = {"perplexity": "{:.3f}", "kl": "{:.4f}", "agreement": "{:.1%}"}


@dataclass(frozen=True)
class QualityRow:
    """One method. bits: stored per quantized weight, scales included; measured: group → metric → value."""

    label: str
    bits: float
    num_fallbacks: int
    measured: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Flat: {"method", "bits_per_weight", "fallbacks", "prose/perplexity", …}."""
        flat = {f"{group}/{metric}": values[metric] for group, values in self.measured.items() for metric in METRICS}
        return {"method": self.label, "bits_per_weight": self.bits, "fallbacks": self.num_fallbacks, **flat}


def cells(rows: Sequence[QualityRow]) -> list[list[str]]:
    """The table as text, heading first."""
    groups = list(rows[0].measured)
    heading = ["method", "bits", *(f"{group} {HEADINGS[metric]}" for group in groups for metric in METRICS)]
    table = [heading]
    for row in rows:
        values = [FORMATS[metric].format(row.measured[group][metric]) for group in groups for metric in METRICS]
        table.append([row.label, f"{row.bits:.2f}", *values])
    return table


def as_text(rows: Sequence[QualityRow]) -> list[str]:
    """Aligned lines for a terminal."""
    table = cells(rows)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]


def as_markdown(rows: Sequence[QualityRow]) -> str:
    """The table for the model card."""
    table = cells(rows)
    rule = ["---", *("---:" for _ in table[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (table[0], rule, *table[1:]))


def caption(rows: Sequence[QualityRow]) -> str:
    """What the columns mean and on how many tokens they were measured."""
    counts = ", ".join(f"{group} {int(values['num_tokens']):,}" for group, values in rows[0].measured.items())
    return (
        "ppl: perplexity; KL: mean divergence from the unquantized target in nats; top-1: positions where both rank the"
        f" same token first. Held-out tokens: {counts}; none was calibrated on."
    )
