"""Progress of a long stage: a bar on a terminal, plain lines elsewhere.

Lines come at most every `LINE_SECONDS`, with percentage, rate and the estimated time left, so that a log file
stays readable and still says when the stage will be done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_SECONDS = 10.0
MINUTE = 60
HOUR = 3600


class Progress(Protocol):
    """Counts finished units of work."""

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""


class LineProgress:
    """Writes a plain line through `emit` at most every `LINE_SECONDS` of `clock` (seconds)."""

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        emit: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._emit, self._clock = emit, clock
        self._done = 0
        self._start = self._last = clock()

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""
        self._done += count
        now = self._clock()
        if now - self._last >= LINE_SECONDS and self._done < self._total:
            self._last = now
            self._emit(self.line(now))

    def line(self, now: float) -> str:
        """E.g. `sampling: 25 % (50 of 200 tokens), 5.0 tokens/s, 30 s left`."""
        rate = self._done / max(now - self._start, 1e-9)
        share = f"{100 * self._done // max(self._total, 1)} %"
        head = f"{self._description}: {share} ({self._done} of {self._total} {self._unit})"
        if self._done == 0:
            return head
        return f"{head}, {rate:.3g} {self._unit}/s, {format_seconds((self._total - self._done) / rate)} left"

    def finish(self) -> None:
        """One closing line, when the work was long enough to have shown any."""
        elapsed = self._clock() - self._start
        if elapsed >= LINE_SECONDS:
            self._emit(f"{self._description}: {self._done} {self._unit} in {format_seconds(elapsed)}")


@contextmanager
def show_progress(total: int, description: str, unit: str) -> Iterator[Progress]:
    """Show the progress of `total` units of work while the block runs.

    Raises ValueError when total is negative.
    """
    if total < 0:
        raise ValueError(f"progress of {description}: total={total} is negative; count the units first")
    if sys.stderr.isatty():
        with _rich_bar(total, description, unit) as bar:
            yield bar
    else:
        lines = LineProgress(total, description, unit, emit=_print_line)
        yield lines
        lines.finish()


def format_seconds(seconds: float) -> str:
    """E.g. `8 s`, `2 min 05 s`, `1 h 12 min`."""
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"


class _RichProgress:
    """Adapter from rich's bar to `Progress`."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def update(self, count: int = 1) -> None:
        self._advance(float(count))


@contextmanager
def _rich_bar(total: int, description: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=total, unit=unit)
        yield _RichProgress(lambda count: bars.advance(task, count))


def _print_line(line: str) -> None:
    sys.stderr.write(f"  {line}\n")
    sys.stderr.flush()
