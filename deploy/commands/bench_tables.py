"""What `deploy bench` shows of a measurement."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Result = Mapping[str, Any]
MOST_SHARES = 6
"""Positions whose acceptance a table shows; the JSON has all."""


def wide_console() -> Console:
    """Plain text; as wide as the terminal, or as a table needs where there is none."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", no_wrap=True)
    return made


def show(result: Result) -> None:
    """Every part of it that has figures."""
    console = wide_console()
    console.print(rows_table(result["rows_ms"]))
    modes = result["modes"]
    console.print(_modes_table("Modes", modes, modes["plain"]))
    if len(modes) > 1:
        console.print(_drafts_table("Drafts, and where a round's milliseconds go", modes))
    if len(modes["plain"]["by_category"]) > 1:
        console.print(_categories_table(modes))
    console.print(_memory_table(modes))
    if "synthetic" in result:
        _show_synthetic(console, result["synthetic"], modes["plain"])


def rows_table(rows_ms: Mapping[str, Mapping[Any, float]]) -> Table:
    """T(rows) of every model."""
    counts = sorted({int(count) for by_rows in rows_ms.values() for count in by_rows})
    made = table("Milliseconds of a forward by its rows", "model", *map(str, counts))
    for name, by_rows in rows_ms.items():
        known = {int(count): milliseconds for count, milliseconds in by_rows.items()}
        made.add_row(name, *(_number(known.get(count)) for count in counts))
    return made


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _times(rate: float | None, plain: float | None) -> str:
    return f"{rate / plain:.2f}x" if rate and plain else ""


def _shares(shares: Any) -> str:
    shown = " / ".join(f"{share:.2f}" for share in shares[:MOST_SHARES]) or "-"
    return f"{shown} / …" if len(shares) > MOST_SHARES else shown


def _modes_table(title: str, modes: Mapping[str, Result], plain: Result) -> Table:
    made = table(
        title, "mode", "decode tok/s", "x plain", "predicted", "end-to-end tok/s", "first token ms", "τ", "identical"
    )
    for name, found in modes.items():
        same = found["identical_to_plain"]
        made.add_row(
            name,
            _number(found["decode_tok_s"], 1),
            _times(found["decode_tok_s"], plain["decode_tok_s"]),
            _number(found["predicted_tok_s"], 1),
            _number(found["e2e_tok_s"], 1),
            _number(found["ttft_ms"]),
            _number(found["tau"]),
            f"{same['same']}/{same['total']}",
        )
    return made


def _drafts_table(title: str, modes: Mapping[str, Result]) -> Table:
    made = table(title, "mode", "acceptance by position", "nodes", "MBSU", "draft", "verify", "other", "chosen")
    for name, found in modes.items():
        parts = found["round_ms"] or {}
        choices = {key: share for key, share in found.get("choices", {}).items() if share}
        made.add_row(
            name,
            _shares(found["acceptance_by_position"]),
            _number(found["nodes_per_round"]),
            _number(found.get("mbsu")),
            *(_number(parts.get(part)) for part in ("draft", "verify", "other")),
            ", ".join(f"{key} {share:.0%}" for key, share in choices.items()),
        )
    return made


def _categories_table(modes: Mapping[str, Result]) -> Table:
    """Decoding speed by kind of text, as tokens per second and as a multiple of the target alone."""
    categories = modes["plain"]["by_category"]
    made = table("Decode tok/s by category", "mode", *categories)
    for name, found in modes.items():
        cells = []
        for category, plain in categories.items():
            rate = found["by_category"][category]["decode_tok_s"]
            cells.append(f"{_number(rate, 1)} ({_times(rate, plain['decode_tok_s'])})" if rate else "")
        made.add_row(name, *cells)
    return made


def _memory_table(modes: Mapping[str, Result]) -> Table:
    made = table("Memory in MB", "mode", "weights", "largest caches", "by model")
    for name, found in modes.items():
        by_model = found["memory"]
        weights, caches = (sum(size[key] for size in by_model.values()) for key in ("weight_bytes", "cache_bytes"))
        each = ", ".join(
            f"{role} {size['weight_bytes'] / 1e6:.1f} + {size['cache_bytes'] / 1e6:.1f}"
            for role, size in by_model.items()
        )
        made.add_row(name, f"{weights / 1e6:.1f}", f"{caches / 1e6:.1f}", each)
    made.caption = f"peak of this process, all models loaded: {modes['plain']['peak_rss_mb']} MB"
    return made


def _show_synthetic(console: Console, synthetic: Result, plain: Result) -> None:
    named = {f"synthetic ({name})": found for name, found in synthetic["modes"].items()}
    shares = _shares(synthetic["acceptance"])
    console.print(_modes_table(f"Synthetic: drafts made to be accepted {shares}; no mode's figures", named, plain))
    console.print(_drafts_table("Synthetic drafts", named))
