"""The fused loss against log_softmax and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from train import distillation
from train.distillation import Drafts, Teacher, distill


def make_drafts(dtype: torch.dtype = torch.float64, num_drafts: int = 37) -> tuple[Drafts, Tensor, Teacher]:
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(0, 11, (num_drafts,), generator=generator).sort().values
    token = token.unique(return_inverse=True)[1]
    drafts = Drafts(
        states=torch.randn(num_drafts, 6, generator=generator, dtype=dtype),
        teacher_states=torch.randn(int(token.max()) + 1, 6, generator=generator, dtype=dtype) * 20,
        token=token,
        weight=torch.rand(num_drafts, generator=generator, dtype=dtype),
    )
    lm_head = torch.randn(19, 6, generator=generator, dtype=dtype)
    norm, rows = torch.rand(6, generator=generator, dtype=dtype), torch.randn(19, 6, generator=generator, dtype=dtype)
    return drafts, lm_head, Teacher(norm, rows, 1e-5)


def reference(drafts: Drafts, lm_head: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy, agreement."""
    states = drafts.teacher_states
    normalized = states / (states.square().mean(-1, keepdim=True) + teacher.rms_norm_eps).sqrt()
    target = (normalized @ teacher.rows.t()).softmax(-1)[drafts.token]
    logits = drafts.states @ lm_head.t()
    cross_entropy = -(target * logits.log_softmax(-1)).sum(-1)
    agreement = (logits.argmax(-1) == target.argmax(-1)).sum()
    return (drafts.weight * cross_entropy).sum(), cross_entropy.sum(), agreement


@pytest.mark.parametrize(("rows_per_slice", "rows_per_block"), [(640, 32), (8, 3), (5, 5), (37, 1)])
def test_scores_and_gradients_are_those_of_log_softmax_and_autograd(
    monkeypatch: pytest.MonkeyPatch, rows_per_slice: int, rows_per_block: int
) -> None:
    monkeypatch.setattr(distillation, "ROWS_PER_SLICE", rows_per_slice)
    monkeypatch.setattr(distillation, "ROWS_PER_BLOCK", rows_per_block)
    drafts, lm_head, teacher = make_drafts()
    found_inputs = [drafts.states.clone().requires_grad_(), lm_head.clone().requires_grad_()]
    scores = distill(drafts._replace(states=found_inputs[0]), found_inputs[1], teacher)
    (3 * scores.loss).backward()
    expected_inputs = [drafts.states.clone().requires_grad_(), lm_head.clone().requires_grad_()]
    loss, cross_entropy, agreement = reference(drafts._replace(states=expected_inputs[0]), expected_inputs[1], teacher)
    (3 * loss).backward()
    torch.testing.assert_close(scores.loss, loss)
    torch.testing.assert_close(scores.cross_entropy, cross_entropy)
    assert scores.agreement == agreement
    for found, expected in zip(found_inputs, expected_inputs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_without_gradients_the_scores_are_the_same() -> None:
    drafts, lm_head, teacher = make_drafts()
    with torch.no_grad():
        scores = distill(drafts, lm_head, teacher)
    assert scores.loss == distill(drafts._replace(states=drafts.states.requires_grad_()), lm_head, teacher).loss
    assert not scores.loss.requires_grad


def test_no_drafts_give_zero_and_zero_gradients() -> None:
    drafts, lm_head, teacher = make_drafts()
    none: Any = Drafts(drafts.states[:0], drafts.teacher_states[:0], drafts.token[:0], drafts.weight[:0])
    states, lm_head = none.states.requires_grad_(), lm_head.requires_grad_()
    scores = distill(none._replace(states=states), lm_head, teacher)
    scores.loss.backward()
    assert scores.loss == 0
    assert lm_head.grad is not None and not lm_head.grad.any()


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    drafts, lm_head, teacher = make_drafts(torch.float32)
    lm_head = lm_head.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = distill(drafts, lm_head, teacher)
    scores.loss.backward()
    exact = lm_head.detach().double().requires_grad_()
    loss = reference(Drafts(*(x.double() if x.is_floating_point() else x for x in drafts)), exact, teacher.double())[0]
    loss.backward()
    assert scores.loss.dtype == torch.float32
    torch.testing.assert_close(scores.loss.double(), loss, rtol=0.02, atol=0)
    assert lm_head.grad is not None and exact.grad is not None
    difference = (lm_head.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert 0 < difference < 0.03
