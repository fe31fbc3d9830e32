"""The model card (README.md) and the HTML report, from one set of facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report import drafter, evaluation, quantized_inputs
from pipeline.report.drafter import DrafterFacts
from pipeline.report.plots import acceptance_bars, bars_by_group, curve
from pipeline.report.quality_table import QualityRow, as_markdown, caption, cells

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Facts:
    """What both documents tell. rows: the source first, then the bundle's own method, then what it is compared with.

    source, stats: `source.json` and `stats.json` of the stages; method: the quantize config; samples: counts by
    group and split; examples: one sample of each group; provenance: pretty-printed JSON; obstacle: why vLLM does not
    load the target; drafters: the bundle's; evaluation: `evaluate.json`, where the bundle was evaluated.
    """

    name: str
    rows: Sequence[QualityRow]
    source: dict[str, Any]
    stats: dict[str, Any]
    method: dict[str, Any]
    samples: dict[str, dict[str, int]]
    examples: Sequence[dict[str, str]]
    provenance: str
    obstacle: str | None = None
    drafters: Sequence[DrafterFacts] = ()
    evaluation: dict[str, Any] | None = None


def model_card(facts: Facts) -> str:
    """README.md of the bundle, Markdown with a hub's front matter."""
    template = _environment(is_html=False).get_template("card.md.jinja")
    speed = evaluation.as_markdown(facts.evaluation) if facts.evaluation else ""
    bits = facts.stats["bits_per_weight"]
    return template.render(**_common(facts), table=as_markdown(facts.rows), bits=bits, speed_table=speed)


def html_report(facts: Facts) -> str:
    """report.html: one file without any outside reference."""
    template = _environment(is_html=True).get_template("report.html.jinja")
    return template.render(
        **_common(facts),
        table=cells(facts.rows),
        kl_plot=Markup(bars_by_group(facts.rows, "kl", skip_first=True)),
        error_table=quantized_inputs.error_cells(facts.stats),
        perplexity_plot=Markup(bars_by_group(facts.rows, "perplexity")),
        samples=facts.samples,
        examples=facts.examples,
        provenance=facts.provenance,
        drafters=[_drafter_section(each) for each in facts.drafters],
        drafter_example=facts.drafters[0].example if facts.drafters else [],
        speed_table=evaluation.cells(facts.evaluation) if facts.evaluation else [],
        speed_plots=[Markup(plot) for plot in evaluation.plots(facts.evaluation)] if facts.evaluation else [],
    )


def _drafter_section(facts: DrafterFacts) -> dict[str, Any]:
    return {
        "role": facts.role,
        "rows": drafter.rows(facts),
        "plots": [Markup(plot) for plot in _drafter_plots(facts)],
    }


def _drafter_plots(facts: DrafterFacts) -> list[str]:
    training = facts.training
    shares = {"as served": training.served.by_position, "as trained": training.plain.by_position}
    title = "τ on held-out conversations (greedy)"
    by_hours = [curve(facts.tau_by_hours, title, x_label="hours trained")] if facts.tau_by_hours else []
    return [
        acceptance_bars(shares, "Acceptance by drafted position (held-out, greedy)"),
        curve(facts.tau, title, x_label="tokens trained on"),
        *by_hours,
        curve(facts.loss, "Training loss", x_label="tokens trained on"),
    ]


def _common(facts: Facts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "origin": facts.source["origin"],
        "licence": facts.source["licence"],
        "lossy": facts.source["precision"]["lossy"],
        "source_bits": facts.source["precision"]["bits_per_weight"],
        "method": {key: value for key, value in facts.method.items() if value is not None},
        "fallbacks": {policy: len(layers) for policy, layers in facts.stats["fallbacks"].items()},
        "float_minima": facts.stats["float_minima"],
        "twin": bool(facts.method.get("twin")),
        "obstacle": facts.obstacle,
        "inputs_lines": quantized_inputs.summary_lines(facts.stats),
        "caption": caption(facts.rows),
        "speed_caption": evaluation.caption(facts.evaluation) if facts.evaluation else "",
        "speed_lines": evaluation.summary_lines(facts.evaluation) if facts.evaluation else [],
        "drafter_lines": [_drafter_line(each) for each in facts.drafters],
        "roles": [each.role for each in facts.drafters],
    }


def _drafter_line(facts: DrafterFacts) -> str:
    return drafter.summary_line(facts.role, facts.training.served, facts.num_bytes)


def _environment(*, is_html: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=False,
    )
