"""What is told of the modes' speed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.report.evaluation import as_markdown, caption, cells, count_same, plots, summary_lines


def mode(rate: float | None, tau: float, acceptance: list[float], same: int = 20) -> dict[str, Any]:
    found = {
        "decode_tok_s": rate,
        "e2e_tok_s": 400.0,
        "predicted_tok_s": 610.0,
        "ttft_ms": 20.0,
        "tokens": 2048,
        "tau": tau,
        "acceptance_by_position": acceptance,
        "round_ms": {"draft": 0.2, "verify": 2.0, "other": 0.1},
        "identical_to_plain": {"same": same, "total": 20},
    }
    return found | {"by_category": {"chat": found, "code": found | {"decode_tok_s": rate and 2 * rate}}}


@pytest.fixture
def result() -> dict[str, Any]:
    modes = {"plain": mode(545.0, 1.0, []), "eagle": mode(690.0, 1.7, [0.6, 0.5]), "lookup": mode(600.0, 1.2, [0.3])}
    modes["auto"] = mode(700.0, 1.6, [0.6, 0.5, 0.4])
    machine = {"cpu": "EPYC", "isa": "avx2", "threads": 2, "load_average": 0.3}
    rows = {"target": {"1": 1.8, "2": 2.0, "16": 4.0}}
    return {"machine": machine, "rows_ms": rows, "modes": modes, "sampled": {"temperature": 0.8, "modes": modes}}


def test_the_last_line_sets_the_fastest_mode_and_auto_beside_the_target_alone(result: dict[str, Any]) -> None:
    assert summary_lines(result) == [
        "plain 545 tok/s, eagle 690 tok/s (1.27x), auto 700 tok/s (1.28x), identical 120/120"
    ]


def test_answers_of_one_token_have_no_rate_and_no_speed_up(result: dict[str, Any]) -> None:
    result["modes"]["plain"] = mode(None, 1.0, [])
    result["modes"]["auto"] = mode(None, 1.0, [])
    assert summary_lines(result) == ["eagle 690 tok/s (0.00x), identical 120/120"]
    assert cells(result)[1][1:3] == ["", "0.00"]
    assert len(plots(result)) == 4


def test_answers_are_counted_greedy_and_sampled_without_the_target_itself(result: dict[str, Any]) -> None:
    result["sampled"]["modes"] = {"plain": mode(1.0, 1.0, []), "auto": mode(1.0, 1.0, [], same=19)}
    assert count_same(result) == (79, 80)


def test_the_card_has_a_small_table(result: dict[str, Any]) -> None:
    lines = as_markdown(result).splitlines()
    assert lines[0] == "| mode | tokens/s | × plain | τ | same answers |"
    assert lines[3] == "| eagle | 690 | 1.27 | 1.70 | 20/20 |"
    assert "EPYC, avx2, 2 threads" in caption(result)
    assert "temperature 0.8" in caption(result)


def test_four_plots_name_modes_categories_and_models(result: dict[str, Any]) -> None:
    speed, acceptance, rows, parts = plots(result)
    for word in ("chat", "code", "all", "eagle", "lookup"):
        assert word in speed
    assert "plain" not in acceptance
    assert "target" in rows
    for word in ("verify", "draft", "other", "plain"):
        assert word in parts
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", speed)


def test_a_mode_has_the_same_colour_in_both_bar_plots(result: dict[str, Any]) -> None:
    speed, acceptance, _rows, _parts = plots(result)
    used = [set(re.findall(r"fill: (#[0-9a-f]{6})", plot)) for plot in (speed, acceptance)]
    assert len(used[0] - used[1]) == 1  # that of the target alone, which drafts nothing


def test_without_drafts_there_is_no_plot_of_acceptance(result: dict[str, Any]) -> None:
    result["modes"] = {"plain": mode(545.0, 1.0, []), "auto": mode(545.0, 1.0, [])}
    assert len(plots(result)) == 3
