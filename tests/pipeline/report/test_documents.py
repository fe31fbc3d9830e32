"""The model card and the HTML report: offline, escaped, deterministic, and honest about source and fallbacks."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from deploy.formats.eagle_record import Acceptance, TrainingRecord
from pipeline.report.documents import Facts, html_report, model_card
from pipeline.report.drafter import DrafterFacts, summary_line
from pipeline.report.plots import bars_by_group, curve
from pipeline.report.quality_table import QualityRow

VALUES = {"perplexity": 16.5, "kl": 0.03, "agreement": 0.9, "num_tokens": 4088}
PRECISION = {"lossy": True, "bits_per_weight": 5.74}
NASTY = "<script>alert('x')</script> & {{ 7 * 7 }}"


def row(label: str, bits: float) -> QualityRow:
    return QualityRow(label, bits, 0, {"prose": VALUES, "code": VALUES | {"kl": 0.01}})


@pytest.fixture
def facts() -> Facts:
    return Facts(
        name="tiny",
        rows=[row("source", 5.74), row("gptq (this bundle)", 4.62), row("rtn", 4.62)],
        source={
            "origin": "pip package x",
            "licence": "apache-2.0",
            "precision": {"lossy": True, "bits_per_weight": 5.74},
        },
        stats={"bits_per_weight": 4.625, "fallbacks": {}, "float_minima": False},
        method={"method": "gptq", "bits": 4},
        samples={"prose, calibration": {"samples": 16, "tokens": 8192}},
        examples=[{"group": "chat", "split": "heldout", "source": "self-written/3", "text": NASTY}],
        provenance='{"seed": 0}',
    )


@pytest.fixture
def drafter() -> DrafterFacts:
    served, plain = Acceptance((0.45, 0.254, 0.15, 0.1), 1.954), Acceptance((0.5, 0.3, 0.2, 0.1), 2.1)
    return DrafterFacts(
        role="eagle-target",
        draft_vocab_size=7000,
        feature_layers=(2, 15, 27),
        training=TrainingRecord(912_345, 420.4, served, "int8, groups of 32", plain, 0.031, 1.61, {}, {}),
        num_parameters=2_540_000,
        num_bytes=5_100_000,
        loss=[(1000.0, 5.5), (2000.0, 4.5)],
        tau=[(1000.0, 1.2), (2000.0, 1.954)],
        tau_by_hours=[(0.05, 1.2), (0.117, 1.954)],
        example=[("<|im_start|>user\n", False), (NASTY, True)],
    )


class Tags(HTMLParser):
    """Collects tags and the addresses that they load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def test_the_report_loads_nothing_from_outside(facts: Facts) -> None:
    html = html_report(facts)
    assert all(address.startswith("#") for address in parse(html).loaded)
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_report_has_two_plots_and_every_method(facts: Facts) -> None:
    html = html_report(facts)
    assert parse(html).tags.count("svg") == 2
    for each in facts.rows:
        assert html.count(each.label) >= 2  # in the table and in a legend
    assert "8192" in html


def test_what_a_model_wrote_is_shown_and_never_run(facts: Facts) -> None:
    html = html_report(replace(facts, name=NASTY))
    assert "script" not in parse(html).tags
    assert "{{ 7 * 7 }}" in html


def test_the_same_facts_give_the_same_bytes(facts: Facts) -> None:
    assert html_report(facts) == html_report(facts)
    assert bars_by_group(facts.rows, "kl") == bars_by_group(facts.rows, "kl")
    assert curve([(1, 2), (3, 4)], "t", x_label="x") == curve([(1, 2), (3, 4)], "t", x_label="x")


def test_a_drafter_is_shown_with_its_worth_its_curves_and_what_it_learned_from(
    facts: Facts, drafter: DrafterFacts
) -> None:
    html = html_report(replace(facts, drafters=[drafter]))
    assert parse(html).tags.count("svg") == 6
    untimed = html_report(replace(facts, drafters=[replace(drafter, tau_by_hours=[])]))
    assert parse(untimed).tags.count("svg") == 5
    for text in (
        "0.450 / 0.254 / 0.150 / 0.100",
        "1.954",
        "2.100",
        "912,345 tokens in 420 s",
        "2, 15, 27",
        "as served",
    ):
        assert text in html
    assert re.search(r"user\n<mark>&lt;script&gt;.*?</mark></pre>", html)
    assert "script" not in parse(html).tags


def test_without_a_drafter_nothing_is_said_of_one(facts: Facts) -> None:
    assert "rafter" not in html_report(facts)
    assert "rafter" not in model_card(facts)


def test_the_card_says_of_a_drafter_what_the_terminal_says(facts: Facts, drafter: DrafterFacts) -> None:
    line = summary_line("eagle-target", drafter.training.served, 5_100_000)
    assert line == ("eagle-target  τ 1.95 at 4 drafted tokens (held-out, greedy) · acceptance .45/.25/.15/.10 · 5.1 MB")
    assert f"```\n{line}\n```" in model_card(replace(facts, drafters=[drafter]))


def test_an_evaluation_is_shown_in_both_documents_and_nothing_where_there_is_none(facts: Facts) -> None:
    found: dict[str, Any] = {
        "decode_tok_s": 545.0,
        "e2e_tok_s": 400.0,
        "predicted_tok_s": 610.0,
        "ttft_ms": 20.0,
        "tokens": 2048,
        "tau": 1.0,
        "acceptance_by_position": [0.5],
        "round_ms": {"draft": 0.2, "verify": 2.0, "other": 0.1},
        "identical_to_plain": {"same": 20, "total": 20},
    }
    modes = {"plain": found | {"by_category": {"chat": found}}, "auto": found | {"by_category": {"chat": found}}}
    machine = {"cpu": NASTY, "isa": "avx2", "threads": 2, "load_average": 0.3}
    result = {"machine": machine, "rows_ms": {"target": {"1": 1.8}}, "modes": modes}
    told = replace(facts, evaluation=result | {"sampled": {"temperature": 0.8, "modes": modes}})
    html = html_report(told)
    assert parse(html).tags.count("svg") == 6
    assert "script" not in parse(html).tags
    assert "plain 545 tok/s, auto 545 tok/s (1.00x), identical 40/40" in html
    assert "## Speed" in model_card(told)
    assert "| auto | 545 | 1.00 | 1.00 | 20/20 |" in model_card(told)
    assert "Speed" not in html_report(facts) + model_card(facts)


@pytest.mark.parametrize("is_lossy", [True, False])
def test_a_source_that_was_quantized_already_is_called_so(facts: Facts, is_lossy: bool) -> None:
    precision = {"lossy": is_lossy, "bits_per_weight": 5.74}
    told = replace(facts, source={**facts.source, "precision": precision})
    assert ("was quantized already (5.74 bits per weight)" in model_card(told)) == is_lossy
    assert ("quantized already" in html_report(told)) == is_lossy


def test_the_card_begins_with_the_hubs_front_matter(facts: Facts) -> None:
    lines = model_card(facts).splitlines()
    assert lines[0] == lines[4] == "---"
    assert "license: apache-2.0" in lines
    assert "| rtn | 4.62 |" in model_card(facts)


@pytest.mark.parametrize("render", [model_card, html_report])
def test_fallbacks_are_counted_by_policy(facts: Facts, render: Any) -> None:
    assert "No layer fell back to another method." in render(facts)
    policies = {"singular Hessian, rounded to nearest": ["a", "b"], "other": ["c"]}
    told = render(replace(facts, stats={**facts.stats, "fallbacks": policies}))
    assert "Fallbacks: 2 × singular Hessian, rounded to nearest; 1 × other." in told


def test_the_card_says_who_can_load_the_weights(facts: Facts) -> None:
    assert "loads in transformers and vLLM" in model_card(facts)
    kept = replace(facts, stats={**facts.stats, "float_minima": True}, method={"method": "keep", "twin": False})
    assert "transformers and vLLM refuse `target/`" in model_card(kept)
    assert "target-w4a16" not in model_card(kept)
    assert "They load `target-w4a16/`" in model_card(replace(kept, method={"method": "keep", "twin": True}))
