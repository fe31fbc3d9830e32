"""The drafters' way into the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stages.export_drafter import EXAMPLE_CHARACTERS, _curves, _example, require_worth


@pytest.mark.parametrize(
    ("role", "key", "remedy"),
    [
        ("eagle-target", "eagle", r"eagle=none"),
        ("intermediate", "intermediate", r"intermediate\.align\.train\.max_seconds.*intermediate=none"),
        ("eagle-intermediate", "eagle_intermediate", r"eagle@eagle_intermediate=none"),
    ],
)
def test_a_collapsed_acceptance_is_refused_with_figure_key_and_remedy(role: str, key: str, remedy: str) -> None:
    message = rf"{role}: .* accepted 0\.031 of the time, below {key}\.min_acceptance=0\.1; train longer .*{remedy}"
    with pytest.raises(ValueError, match=message):
        require_worth(role, 0.031, 0.1)
    require_worth(role, 0.1, 0.1)


def test_the_curves_of_two_phases_lie_one_after_the_other() -> None:
    phase = {
        "training": [{"tokens": 10, "loss": 3.0}, {"tokens": 20, "loss": 2.0}],
        "evaluations": [{"tokens": 20, "seconds": 1800.0, "metrics": {"tau": 1.5}}],
    }
    loss, tau, tau_by_hours = _curves({"pretrain": phase, "align": phase})
    assert loss == [(10, 3.0), (20, 2.0), (30, 3.0), (40, 2.0)]
    assert tau == [(20, 1.5), (40, 1.5)]
    assert tau_by_hours == [(0.5, 1.5), (1.0, 1.5)]
    assert _curves(phase) == (loss[:2], tau[:1], tau_by_hours[:1])
    assert _curves({}) == ([], [], [])


def test_a_budget_in_tokens_has_no_hours() -> None:
    phase = {"training": [], "evaluations": [{"tokens": 20, "seconds": None, "metrics": {"tau": 1.5}}]}
    assert _curves(phase)[2] == []


def test_the_example_is_cut_at_the_marks_of_what_was_learned(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("<|im_start|>user\nHi⟦Hello.⟧\nAnd?⟦Yes⟧")
    expected = [("<|im_start|>user\nHi", False), ("Hello.", True), ("\nAnd?", False), ("Yes", True)]
    assert _example(tmp_path / "sample.txt") == expected


def test_a_long_example_is_shortened(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("a⟦" + "b" * 9999 + "⟧")
    assert _example(tmp_path / "sample.txt") == [("a", False), ("b" * (EXAMPLE_CHARACTERS - 2), True)]
