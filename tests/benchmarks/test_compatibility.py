"""The compatibility table: columns for every bundle, and a source without times."""

from __future__ import annotations

from typing import Any

from benchmarks.compatibility import in_turn, quality, table

ROW = {"method": "x (this bundle)", "bits_per_weight": 4.6, "prose/perplexity": 15.1, "prose/kl": 0.08, "fallbacks": 0}


def test_a_row_of_the_manifest_is_split_by_kind_of_text() -> None:
    assert quality(ROW) == {"perplexity": {"prose": 15.1}, "kl": {"prose": 0.08}}


def test_every_line_has_all_columns_and_unknown_values_are_a_dash() -> None:
    source: dict[str, Any] = {"name": "source", "bits_per_weight": 16.0, **quality(ROW)}
    ms = {"T(1)": 2.0, "T(6)": 3.0, "T(16)": 5.0, "T(64)": 20.0, "prefill(512)": 150.0}
    bundle = {**source, "name": "gptq", "mb": 118.2, "ms": ms, "tau": 1.89, "eagle_speed_up": 1.22}
    heading, _, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table([source, bundle]).splitlines()
    )
    assert len(heading) == len(first) == len(second)
    assert dict(zip(heading, first, strict=True))["T(64)/T(1)"] == "–"
    told = dict(zip(heading, second, strict=True))
    assert (told["T(6)/T(1)"], told["T(64)/T(1)"], told["τ"], told["EAGLE speed-up"]) == (
        "1.50",
        "10.00",
        "1.89",
        "1.22",
    )


def test_calls_are_made_in_turn() -> None:
    made: list[str] = []
    found = in_turn([lambda: made.append("a"), lambda: made.append("b")], 2)
    assert made == ["a", "b"] * 3
    assert len(found) == 2
