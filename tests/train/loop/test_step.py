"""One step against plain torch: normalisation over batches, clipping, AdamW, precision, recomputation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from tests.train.loop.tiny import TinyModel, TinyTask, texts
from train.loop.batches import Batch, BatchPlan
from train.loop.model_state import trained_parameters
from train.loop.settings import TrainSettings
from train.loop.step import Stepper

UNEQUAL = ([0, 1, 2, 3, 4, 5], [6], [7, 8])
"""Texts of three batches: the mean of their means is far from the mean over their positions."""


def make_batches() -> list[Batch]:
    plan = BatchPlan(texts(9, seed=8, shortest=5), tokens_per_batch=400, max_length=40, seed=0)
    return [plan.batch(indices) for indices in UNEQUAL]


def make_stepper(task: TinyTask, **options: Any) -> Stepper:
    settings = TrainSettings(max_tokens=1, **{"precision": "fp32", **options})
    return Stepper(task, settings, Accelerator(mixed_precision="no"))


def make_task() -> TinyTask:
    return TinyTask(TinyModel(dropout=0.0))


def reference_step(clip: float, weight_decay: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """Parameters, mean loss and gradient norm of two plain torch steps in float64 on all texts, one by one."""
    model = make_task().model.double()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)
    mean, norm = torch.zeros(()), torch.zeros(())
    for _ in range(2):
        losses = []
        for text in texts(9, seed=8, shortest=5):
            ids = torch.from_numpy(text.token_ids).long()
            logits = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), None)
            mask = torch.from_numpy(text.loss_mask())[1:]
            losses.append(functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[mask])
        mean = torch.cat(losses).mean()
        optimizer.zero_grad()
        mean.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in trained_parameters(model).items()}, mean.item(), norm.item()


@pytest.mark.parametrize("clip", [0.05, 1000.0])
def test_a_step_over_unequal_batches_is_that_of_the_mean_over_all_positions(clip: float) -> None:
    expected, mean, norm = reference_step(clip, weight_decay=0.3)
    task = make_task()
    stepper = make_stepper(task, clip=clip, weight_decay=0.3)
    for _ in range(2):
        outcome = stepper.step(iter(make_batches()), 3, learning_rate=0.01)
    assert outcome.loss / outcome.count == pytest.approx(mean, rel=1e-5)
    assert outcome.gradient_norm == pytest.approx(norm, rel=1e-4)
    for name, parameter in trained_parameters(task.model).items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=2e-5)


def test_a_step_without_any_counted_position_changes_nothing_but_by_momentum() -> None:
    task = make_task()
    batch = make_batches()[0]
    empty = Batch(batch.token_ids, torch.zeros_like(batch.loss_mask), batch.position, batch.starts)
    before = [parameter.clone() for parameter in task.model.parameters()]
    outcome = make_stepper(task).step(iter([empty]), 1, learning_rate=0.01)
    assert (outcome.loss, outcome.count, outcome.gradient_norm) == (0.0, 0.0, 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, task.model.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_leaves_parameters_and_optimizer_as_they_were(value: float) -> None:
    task = make_task()
    stepper = make_stepper(task)
    stepper.step(iter(make_batches()), 3, learning_rate=0.01)
    before = [parameter.clone() for parameter in task.model.parameters()]
    moments = {name: tensor.clone() for name, tensor in stepper.optimizer.state().items()}
    task.model.head.bias.register_hook(lambda gradient: gradient * value)
    outcome = stepper.step(iter(make_batches()), 3, learning_rate=0.01)
    assert not outcome.is_finite and math.isfinite(outcome.loss)
    assert all(torch.equal(old, new) for old, new in zip(before, task.model.parameters(), strict=True))
    after = stepper.optimizer.state()
    assert moments.keys() == after.keys() and any("exp_avg" in name for name in moments)
    assert all(torch.equal(moments[name], after[name]) for name in moments)


@pytest.mark.parametrize(("optimizer", "has_momentum"), [("adamw", False), ("muon", True)])
def test_the_settings_choose_the_optimizer(optimizer: str, has_momentum: bool) -> None:
    stepper = make_stepper(make_task(), optimizer=optimizer)
    stepper.step(iter(make_batches()), 3, learning_rate=0.01)
    assert any(name.endswith(":momentum") for name in stepper.optimizer.state()) == has_momentum


def test_recomputed_activations_give_the_same_bits_and_run_layers_twice() -> None:
    plain, recomputed = make_task(), make_task()
    calls: list[int] = []
    recomputed.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    make_stepper(plain).step(iter(make_batches()), 3, learning_rate=0.01)
    make_stepper(recomputed, activation_recomputation=True).step(iter(make_batches()), 3, learning_rate=0.01)
    assert len(calls) == 2 * 3
    for one, other in zip(plain.model.parameters(), recomputed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_recomputation_of_a_model_that_cannot_is_refused() -> None:
    task = make_task()
    task.model = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="activation_recomputation=true: Linear cannot recompute"):
        make_stepper(task, activation_recomputation=True)


def test_bfloat16_reaches_the_matrix_products_and_leaves_parameters_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    task = make_task()
    seen: list[torch.dtype] = []
    task.model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    stepper = make_stepper(task, precision="bf16")
    exact = make_stepper(make_task()).step(iter(make_batches()), 3, learning_rate=0.01)
    outcome = stepper.step(iter(make_batches()), 3, learning_rate=0.01)
    stepper.evaluate()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3 + 5
    assert outcome.loss == pytest.approx(exact.loss, rel=0.02)
    assert {parameter.dtype for parameter in task.model.parameters()} == {torch.float32}


def test_evaluation_runs_without_dropout_and_training_with() -> None:
    task = TinyTask(TinyModel(dropout=0.5))
    modes: list[bool] = []
    task.model.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    task.model.eval()  # as a caller may leave it
    stepper = make_stepper(task)
    for _ in range(2):
        stepper.step(iter(make_batches()), 3, learning_rate=0.0)
        stepper.evaluate()
    assert modes == 2 * (3 * [True] + 5 * [False])
