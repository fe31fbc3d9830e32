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
    return grouped_bars(positions, shares, title)


def grouped_bars(
    groups: Sequence[str], values: Mapping[str, Sequence[float]], title: str, *, labels: Sequence[str] = ()
) -> str:
    """An SVG element: for each group one bar per entry of `values` (label → a value per group).

    labels: all that share colours with another plot, in its order; by default those of `values`.
    """
    order = list(labels or values)
    series = [(order.index(label), label, list(found)) for label, found in values.items()]
    return _svg(lambda axes, plt: _bars(axes, plt, groups, series), title)


def stacked_bars(groups: Sequence[str], parts: Mapping[str, Sequence[float]], title: str) -> str:
    """An SVG element: for each group one bar, made of the parts (label → a value per group) from below."""

    def draw(axes: Any, plt: Any) -> None:
        below = [0.0] * len(groups)
        for colour, (label, values) in enumerate(parts.items()):
            axes.bar(range(len(groups)), values, 0.6, bottom=below, label=label, color=plt.colormaps["tab20"](colour))
            below = [bottom + value for bottom, value in zip(below, values, strict=True)]
        axes.set_xticks(range(len(groups)), groups)
        _legend(axes, len(parts))

    return _svg(draw, title)


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, *, x_label: str) -> str:
    """An SVG element: one line of marked points (x, y) per entry of `curves`, from zero upwards."""

    def draw(axes: Any, _plt: Any) -> None:
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label, fontsize=8)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, title)


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
    _legend(axes, len(series))


def _legend(axes: Any, num_labels: int) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(num_labels, 5))


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
