"""SVG plots for the report, drawn by matplotlib without a display; deterministic bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.quality_table import QualityRow

TITLES = {"kl": "KL divergence from the unquantized target (nats, lower is better)", "perplexity": "Perplexity"}


def bars_by_group(rows: Sequence[QualityRow], metric: str, *, skip_first: bool = False) -> str:
    """An SVG element: for each kind of text one bar per row. A row keeps its colour when the first is skipped."""
    groups = list(rows[0].measured)
    shown = list(enumerate(rows))[int(skip_first) :]
    series = [(colour, row.label, [row.measured[group][metric] for group in groups]) for colour, row in shown]
    return _svg(lambda axes, plt: _bars(axes, plt, groups, series), TITLES[metric])


def acceptance_bars(shares: Mapping[str, Sequence[float]], title: str) -> str:
    """An SVG element: for each drafted position one bar per entry of `shares` (label → share by position)."""
    positions = [str(position + 1) for position in range(len(next(iter(shares.values()))))]
    series = [(colour, label, list(values)) for colour, (label, values) in enumerate(shares.items())]
    return _svg(lambda axes, plt: _bars(axes, plt, positions, series), title)


def curve(points: Sequence[tuple[float, float]], title: str, *, x_label: str) -> str:
    """An SVG element: a line through the points (x, y), which are marked where they are few."""

    def draw(axes: Any, _plt: Any) -> None:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3, linewidth=1.2)
        axes.set_xlabel(x_label, fontsize=8)

    return _svg(draw, title)


def _bars(axes: Any, plt: Any, groups: Sequence[str], series: Sequence[tuple[int, str, Sequence[float]]]) -> None:
    """series: (number of its colour, label, a value per group)."""
    width = 0.8 / len(series)
    for place, (colour, label, values) in enumerate(series):
        places = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, values, width, label=label, color=plt.colormaps["tab20"](colour % 20))
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(len(series), 5))


def _svg(draw: Callable[[Any, Any], None], title: str) -> str:
    """The SVG element of what `draw(axes, pyplot)` draws."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "understudy", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7.5, 3.0))
        draw(axes, plt)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
