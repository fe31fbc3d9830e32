"""The sliced loss against torch's cross-entropy and autograd."""

import pytest
import torch
from torch import Tensor

from train.intermediate import cross_entropy
from train.intermediate.cross_entropy import score_tokens


def inputs(num: int = 37, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(num, 6, generator=generator, dtype=dtype)
    rows = torch.randn(19, 6, generator=generator, dtype=dtype)
    return states, rows, torch.randint(0, 19, (num,), generator=generator)


@pytest.mark.parametrize(("logits_per_slice", "rows_per_block"), [(10**6, 32), (19 * 8, 3), (1, 5)])
def test_loss_and_gradients_are_those_of_cross_entropy_and_autograd(
    monkeypatch: pytest.MonkeyPatch, logits_per_slice: int, rows_per_block: int
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_SLICE", logits_per_slice)
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 2)
    monkeypatch.setattr(cross_entropy, "ROWS_PER_BLOCK", rows_per_block)
    states, rows, labels = inputs()
    found = [states.clone().requires_grad_(), rows.clone().requires_grad_()]
    scores = score_tokens(*found, labels)
    (3 * scores.loss).backward()
    wanted = [states.clone().requires_grad_(), rows.clone().requires_grad_()]
    logits = wanted[0] @ wanted[1].t()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (3 * loss).backward()
    torch.testing.assert_close(scores.loss, loss)
    assert scores.agreement == (logits.argmax(-1) == labels).sum()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_rows_that_are_not_trained_cost_no_gradient_and_change_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    states, rows, labels = inputs()
    gradients = []
    for trained in (True, False):
        ours = states.clone().requires_grad_()
        frozen = rows.clone().requires_grad_(trained)
        score_tokens(ours, frozen, labels).loss.backward()
        gradients.append(ours.grad)
        assert (frozen.grad is not None) == trained
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_no_tokens_give_zero_and_zero_gradients() -> None:
    states, rows, labels = inputs()
    states, rows = states[:0].requires_grad_(), rows.requires_grad_()
    scores = score_tokens(states, rows, labels[:0])
    scores.loss.backward()
    assert scores.loss == 0
    assert rows.grad is not None and not rows.grad.any()


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    states, rows, labels = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(states, rows, labels)
    exact = torch.nn.functional.cross_entropy(states @ rows.t(), labels, reduction="sum")
    assert scores.loss.dtype == torch.float32
    assert scores.loss != exact
    torch.testing.assert_close(scores.loss, exact, rtol=0.02, atol=0)
