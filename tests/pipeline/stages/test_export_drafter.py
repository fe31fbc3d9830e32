"""The drafter's way into the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stages.export_drafter import EXAMPLE_CHARACTERS, _example, require_worth


def test_a_collapsed_acceptance_is_refused_with_figure_key_and_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"accepted 0\.031 of the time, below eagle\.min_acceptance=0\.1; train longer"
    ):
        require_worth(0.031, 0.1)
    require_worth(0.1, 0.1)


def test_the_example_is_cut_at_the_marks_of_what_was_learned(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("<|im_start|>user\nHi⟦Hello.⟧\nAnd?⟦Yes⟧")
    expected = [("<|im_start|>user\nHi", False), ("Hello.", True), ("\nAnd?", False), ("Yes", True)]
    assert _example(tmp_path / "sample.txt") == expected


def test_a_long_example_is_shortened(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("a⟦" + "b" * 9999 + "⟧")
    assert _example(tmp_path / "sample.txt") == [("a", False), ("b" * (EXAMPLE_CHARACTERS - 2), True)]
