"""Progress lines."""

from __future__ import annotations

import pytest

from pipeline.progress import LINE_SECONDS, LineProgress, format_seconds, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_most_once_per_interval_with_share_rate_and_time_left() -> None:
    clock, lines = Clock(), []
    bar = LineProgress(200, "sampling", "tokens", lines.append, clock)
    for _ in range(50):
        clock.now += LINE_SECONDS / 50
        bar.update()
    assert lines == ["sampling: 25 % (50 of 200 tokens), 5 tokens/s, 30 s left"]


def test_a_short_stage_says_nothing() -> None:
    lines: list[str] = []
    bar = LineProgress(2, "x", "files", lines.append, Clock())
    bar.update(2)
    bar.finish()
    assert lines == []


def test_a_long_stage_closes_with_its_total() -> None:
    clock, lines = Clock(), []
    bar = LineProgress(2, "x", "files", lines.append, clock)
    clock.now += 75
    bar.update(2)
    bar.finish()
    assert lines == ["x: 2 files in 1 min 15 s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (4321, "1 h 12 min")]
)
def test_seconds_read_naturally(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_negative_total_is_refused() -> None:
    with pytest.raises(ValueError, match="total=-1"), show_progress(-1, "x", "files"):
        pass


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with show_progress(3, "x", "files") as bar:
        bar.update(3)
    assert not isinstance(bar, LineProgress)
