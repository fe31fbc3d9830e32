"""What forwards and drafts cost on this machine: measured once in seconds, then read from a cache.

The cache is the user's (`$XDG_CACHE_HOME/understudy/costs`), a file per bundle and device; a bundle itself never
changes. `python -m deploy tune BUNDLE` measures again.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.formats.unfinished import unfinished
from deploy.runtime.backend import SEQUENCE_END, Backend, Row
from deploy.runtime.drafters.base import DraftModel
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits

ROW_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
DRAFT_DEPTHS, DRAFT_WIDTHS = (1, 4), (1, 4)
CONTEXT, REPEATS = 256, 15
VERSION = 1
_PROCEDURE = 4
"""Raised with every change to how costs are measured, or to what is computed: what was measured otherwise is measured
again."""
_IN_A_ROW = 3
"""Forwards that are timed one after the other."""
_SETTLING_FORWARDS, _SETTLING_MS = 12, 40.0
"""Before them, of the same count: so many, or what takes so long."""
_ROUND_ROWS = 5
"""Rows of the forward before a draft that is timed."""
SCRATCH = 1 << 40
"""The sequence that measuring uses: nobody else's."""


@dataclass(frozen=True)
class DraftCost:
    """first_ms: a draft of one level. level_ms: width → each further level."""

    first_ms: float
    level_ms: Mapping[int, float]

    def milliseconds(self, depth: float, width: float = 1) -> float:
        """Of a draft with `depth` levels of `width` nodes."""
        widths = sorted(self.level_ms)
        level = np.interp(width, widths, [self.level_ms[w] for w in widths])
        return self.first_ms + max(depth - 1, 0) * float(level)


@dataclass(frozen=True)
class Costs:
    """rows_ms: model → number of rows → milliseconds of a forward. drafts: drafting model → what its drafts cost."""

    rows_ms: Mapping[str, Mapping[int, float]]
    drafts: Mapping[str, DraftCost]

    def forward_ms(self, model: str, rows: float) -> float:
        """Of a forward with so many rows, between the measured counts; beyond the last, in its proportion.

        No count costs more than a larger one: what was measured otherwise was noise.
        """
        measured = self.rows_ms[model]
        counts = sorted(measured)
        if rows > counts[-1]:
            return measured[counts[-1]] * rows / counts[-1]
        least = np.minimum.accumulate([measured[count] for count in reversed(counts)])[::-1]
        return float(np.interp(rows, counts, least))

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "rows_ms": {name: {str(n): ms for n, ms in by_rows.items()} for name, by_rows in self.rows_ms.items()},
            "drafts": {
                name: {"first_ms": cost.first_ms, "level_ms": {str(w): ms for w, ms in cost.level_ms.items()}}
                for name, cost in self.drafts.items()
            },
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Costs:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']!r} is not {VERSION}")
        return cls(
            rows_ms={name: {int(n): float(ms) for n, ms in m.items()} for name, m in raw["rows_ms"].items()},
            drafts={
                name: DraftCost(float(m["first_ms"]), {int(w): float(ms) for w, ms in m["level_ms"].items()})
                for name, m in raw["drafts"].items()
            },
        )


def measure_rows(
    model: Backend, counts: Sequence[int] | None = None, *, context: int = CONTEXT, repeats: int | None = None
) -> dict[int, float]:
    """Rows → median milliseconds of a forward that continues `context` tokens by a chain of that many and chooses a
    token after each. Where the model's context is shorter, it continues as many as leave room for the longest chain.

    counts: by default the model's own `row_counts` (a GPU's forward takes the time of its row bucket), or ROW_COUNTS.
    repeats: timed calls of each count, by default REPEATS; rounded up to a multiple of three.

    A few in a row, after others that are not timed: what a forward takes depends on those just before it. After any
    pause in reading weights (a forward of many rows, or 8 ms of nothing) a Xeon's forwards of one row took 1.2 times as
    long, and needed some 40 ms to recover (`python -m benchmarks.settling`); yet decoding does one kind for long.
    Tokens are on the host when a forward returns, so a GPU has then done all of its work.
    """
    shape, greedy = model.shape, SamplingParams()
    if counts is None:
        counts = getattr(model, "row_counts", ROW_COUNTS)
    context = max(1, min(context, shape.context_length - max(counts)))
    model.reset(SCRATCH)
    model.forward(chain_of_rows(0, context, shape.vocab_size), logit_rows=[])
    model.keep(SCRATCH, range(context))
    chains = {n: chain_of_rows(context, n, shape.vocab_size) for n in counts if context + n <= shape.context_length}

    def timed(rows: list[Row]) -> float:
        begin = time.perf_counter()
        model.forward_tokens(rows, greedy)
        return (time.perf_counter() - begin) * 1e3

    times: dict[int, list[float]] = {count: [] for count in chains}
    for _turn in range(-(-(repeats or REPEATS) // _IN_A_ROW)):  # so that a busy moment meets all counts
        for count, rows in chains.items():
            settling = 0.0
            for _ in range(_SETTLING_FORWARDS):
                settling += timed(rows)
                if settling >= _SETTLING_MS:
                    break
            times[count] += [timed(rows) for _ in range(_IN_A_ROW)]
    model.reset(SCRATCH)
    return {count: round(statistics.median(found), 4) for count, found in times.items()}


def measure_drafts(
    model: DraftModel, target: Backend, hidden_size: int, *, context: int = CONTEXT, repeats: int | None = None
) -> DraftCost:
    """A round's draft: two new tokens read, and one or four levels of one or four nodes. repeats: of each.

    Before each, `target` does a forward of a few rows, as in a round: it leaves the caches full of its own weights.
    hidden_size: of the model whose states the drafts begin with.
    """
    vocab_size = target.shape.vocab_size
    num_states = len(model.feature_layers) * hidden_size
    rng = np.random.default_rng(0)

    def draft(count: int, limits: TreeLimits) -> None:
        tokens = [(100 + i) % vocab_size for i in range(count)]
        states = rng.standard_normal((count, num_states)).astype(np.float32) if num_states else None
        model.draft(SCRATCH, tokens, states, limits, SamplingParams())

    def timed(depth: int, width: int) -> float:
        limits = TreeLimits(depth, width, depth * width)

        times = []
        for _ in range((repeats or REPEATS) + 1):  # the first one warms up
            target.forward_tokens(rows, SamplingParams())
            model.truncate(SCRATCH, context)
            begin = time.perf_counter()
            draft(2, limits)
            times.append((time.perf_counter() - begin) * 1e3)
        return round(statistics.median(times[1:]), 4)

    rows = chain_of_rows(0, min(_ROUND_ROWS, target.shape.context_length), vocab_size)
    target.reset(SCRATCH)
    model.reset(SCRATCH)
    draft(context, TreeLimits(1, 1, 1))
    first = timed(1, 1)
    levels = {width: max(timed(4, width) - first, 0.0) / 3 for width in DRAFT_WIDTHS}
    target.reset(SCRATCH)
    model.reset(SCRATCH)
    return DraftCost(first, levels)


def chain_of_rows(start: int, count: int, vocab_size: int) -> list[Row]:
    """Rows of SCRATCH that follow one another from position `start` on."""
    return [Row((100 + i) % vocab_size, start + i, SCRATCH, i - 1 if i else SEQUENCE_END) for i in range(count)]


def cache_path(bundle_digest: str, device: Mapping[str, Any]) -> Path:
    """Where the costs of a bundle on a device lie. device: what makes one differ from another, as plain JSON.

    Raises RuntimeError for a user without a home directory, where XDG_CACHE_HOME names none.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = json.dumps([bundle_digest, device, _PROCEDURE], sort_keys=True)
    return Path(base) / "understudy" / "costs" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def read_costs(path: Path) -> Costs | None:
    """What was measured before; None where there is nothing, or nothing that this version wrote."""
    try:
        return Costs.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_costs(path: Path, costs: Costs) -> None:
    """Atomically. Raises OSError where the cache cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        temporary.write_text(json.dumps(costs.to_json(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
