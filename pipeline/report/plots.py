"""SVG plots for the report, drawn by matplotlib without a display; deterministic bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Sequence

from pipeline.report.quality_table import QualityRow

TITLES = {"kl": "KL divergence from the unquantized target (nats, lower is better)", "perplexity": "Perplexity"}


def bars_by_group(rows: Sequence[QualityRow], metric: str, *, skip_first: bool = False) -> str:
    """An SVG element: for each kind of text one bar per row. A row keeps its colour when the first is skipped."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    groups = list(rows[0].measured)
    with plt.rc_context({"svg.hashsalt": "understudy", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7.5, 3.0))
        shown = list(enumerate(rows))[int(skip_first) :]
        width = 0.8 / len(shown)
        for place, (colour, row) in enumerate(shown):
            places = [group + (place - (len(shown) - 1) / 2) * width for group in range(len(groups))]
            values = [row.measured[group][metric] for group in groups]
            axes.bar(places, values, width, label=row.label, color=plt.colormaps["tab20"](colour % 20))
        axes.set_xticks(range(len(groups)), groups)
        axes.set_title(TITLES[metric], fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(len(shown), 5))
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
