"""One table in four forms."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.quality_table import QualityRow, as_markdown, as_text, caption, cells

PROSE = {"perplexity": 16.5004, "kl": 0.0, "agreement": 1.0, "num_tokens": 4088}
CHAT = {"perplexity": 3.6, "kl": 0.0, "agreement": 1.0, "num_tokens": 99}


def row(label: str, bits: float, factor: float, **fields: Any) -> QualityRow:
    measured = {
        group: {**values, "perplexity": values["perplexity"] * factor, "kl": factor - 1, "agreement": 1 / factor}
        for group, values in (("prose", PROSE), ("chat", CHAT))
    }
    return QualityRow(label, bits, fields.get("num_fallbacks", 0), measured)


@pytest.fixture
def rows() -> list[QualityRow]:
    return [row("source", 5.74, 1.0), row("gptq (this bundle)", 4.625, 1.25, num_fallbacks=3), row("rtn", 4.625, 2.0)]


def test_cells_hold_three_figures_for_each_kind_of_text(rows: list[QualityRow]) -> None:
    heading, source, own, _ = cells(rows)
    expected = ["method", "bits", "prose_ppl", "prose_KL", "prose_top-1", "chat_ppl", "chat_KL", "chat_top-1"]
    assert heading == [name.replace("_", " ") for name in expected]
    assert source == ["source", "5.74", "16.500", "0.0000", "100.0%", "3.600", "0.0000", "100.0%"]
    assert own == ["gptq (this bundle)", "4.62", "20.625", "0.2500", "80.0%", "4.500", "0.2500", "80.0%"]


def test_the_terminals_columns_are_aligned(rows: list[QualityRow]) -> None:
    lines = as_text(rows)
    assert len({len(line) for line in lines}) == 1
    end = lines[0].index("prose ppl") + len("prose ppl")
    assert [line[:end].split()[-1] for line in lines[1:]] == ["16.500", "20.625", "33.001"]


def test_markdown_has_as_many_cells_in_every_line(rows: list[QualityRow]) -> None:
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {9}
    assert lines[1].split("|")[2].strip() == "---:"


def test_json_is_flat_and_counts_fallbacks(rows: list[QualityRow]) -> None:
    flat = rows[1].as_dict()
    assert flat["fallbacks"] == 3
    assert flat["prose/perplexity"] == pytest.approx(20.6255)
    assert "chat/num_tokens" not in flat


def test_the_caption_says_on_how_many_tokens(rows: list[QualityRow]) -> None:
    assert "Held-out tokens: prose 4,088, chat 99; none was calibrated on." in caption(rows)
