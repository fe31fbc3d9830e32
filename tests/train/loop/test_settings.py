"""Settings: what is refused, the budget, and the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from train.loop.settings import TrainSettings

SETTINGS = TrainSettings(max_tokens=1000)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": None}, "no budget: set one or more of eagle.max_seconds, eagle.max_tokens, eagle.max_epochs"),
        ({"max_tokens": 0}, "eagle.max_tokens=0 must be above 0"),
        ({"learning_rate": -1.0}, "eagle.learning_rate=-1.0 must be above 0"),
        ({"learning_rate": math.nan}, "eagle.learning_rate=nan must be above 0"),
        ({"accumulation": 0}, "eagle.accumulation=0 must be above 0"),
        ({"weight_decay": -0.1}, "eagle.weight_decay=-0.1 must be 0 or more"),
        ({"warmup_share": 1.5}, "eagle.warmup_share=1.5 must be between 0 and 1"),
        ({"evaluate_every": 0.0}, "eagle.evaluate_every=0.0 must be a share of the budget"),
        ({"betas": (0.9, 1.0)}, r"eagle.betas=\(0.9, 1.0\) must be two, each 0 or more and below 1"),
        ({"betas": (0.9,)}, r"eagle.betas=\(0.9,\) must be two"),
        ({"optimizer": "sgd"}, "eagle.optimizer=sgd must be one of adamw, muon"),
        ({"precision": "fp16"}, "eagle.precision=fp16 must be one of auto, fp32, bf16"),
        ({"max_length": 4096}, "eagle.max_length=4096 exceeds eagle.tokens_per_batch=2048; .*lower the one"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    SETTINGS.check()
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changed).check("eagle.")


def test_progress_is_that_of_the_budget_that_ends_first() -> None:
    settings = TrainSettings(max_tokens=1000, max_seconds=50, max_epochs=4)
    assert settings.progress(seconds=5, tokens=300, epochs=1) == 0.3
    assert settings.progress(seconds=45, tokens=300, epochs=1) == 0.9
    assert settings.progress(seconds=5, tokens=300, epochs=5) == 1.25
    assert SETTINGS.progress(seconds=1e9, tokens=10, epochs=1e9) == 0.01


def test_the_learning_rate_warms_up_then_follows_torchs_cosine() -> None:
    settings = replace(SETTINGS, learning_rate=0.2, warmup_share=0.1, min_learning_rate_ratio=0.25)
    assert [settings.learning_rate_at(share) for share in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.1, 0.2])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.05)
    for percent in range(10, 101):
        assert settings.learning_rate_at(percent / 100) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()
    assert settings.learning_rate_at(1.3) == pytest.approx(0.05)


def test_a_warm_up_over_the_whole_budget_ends_at_the_peak() -> None:
    settings = replace(SETTINGS, learning_rate=0.2, warmup_share=1.0)
    assert settings.learning_rate_at(0.5) == pytest.approx(0.1)
    assert settings.learning_rate_at(1.0) == pytest.approx(0.2)


@pytest.mark.parametrize("is_native", [True, False])
def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch, is_native: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    cpu = torch.device("cpu")
    assert SETTINGS.resolve_precision(cpu) == ("bf16" if is_native else "fp32")
    assert replace(SETTINGS, precision="fp32").resolve_precision(cpu) == "fp32"
    forced = replace(SETTINGS, precision="bf16")
    if is_native:
        assert forced.resolve_precision(cpu) == "bf16"
    else:
        with pytest.raises(ValueError, match="precision=bf16: this cpu does not multiply bfloat16 natively; use auto"):
            forced.resolve_precision(cpu)


def test_features_are_captured_ahead_only_where_that_does_not_take_the_steps_own_cores() -> None:
    assert SETTINGS.resolve_prefetch(torch.device("cpu")) == 0
    assert SETTINGS.resolve_prefetch(torch.device("cuda")) == 2
    assert replace(SETTINGS, prefetch=3).resolve_prefetch(torch.device("cpu")) == 3
    assert replace(SETTINGS, prefetch=0).resolve_prefetch(torch.device("cuda")) == 0
