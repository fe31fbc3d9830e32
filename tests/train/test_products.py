import pytest
import torch
from torch.nn.functional import linear as plain_linear

from train.products import ROW_MULTIPLE, fill_rows, linear

SIZES = [1, ROW_MULTIPLE - 1, ROW_MULTIPLE, ROW_MULTIPLE + 1]


def both(count, dtype, *, lowered):
    """Product and gradients of ours and torch's, with the same numbers."""
    torch.manual_seed(count)
    rows, weight, grad = (torch.randn(*size, dtype=dtype) for size in ((count, 24), (40, 24), (count, 40)))
    found = []
    for function in (linear, plain_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            product = function(*leaves)
        product.backward(grad.to(product.dtype))
        found.append((product.detach(), *(leaf.grad for leaf in leaves)))
    return found


@pytest.mark.parametrize("count", SIZES)
def test_under_autocast_it_is_torchs_with_rows_of_zeros_that_nobody_sees(count):
    for ours, theirs in zip(*both(count, torch.float32, lowered=True), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", SIZES)
def test_otherwise_it_is_torchs(count):
    for ours, theirs in zip(*both(count, torch.float64, lowered=False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("count", "expected"), [(1, 64), (64, 64), (65, 128)])
def test_only_rows_of_a_compiled_type_are_filled_up(count, expected):
    rows = torch.ones(count, 3)
    filled = fill_rows(rows, torch.bfloat16)
    assert filled.shape == (expected, 3)
    assert filled.dtype == torch.bfloat16
    assert filled.sum() == 3 * count
    assert fill_rows(rows, torch.float32) is rows


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_that_nobody_wants_is_not_computed(needs):
    rows, weight = (torch.randn(5, 8).requires_grad_(need) for need in needs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(rows, weight).sum().backward()
    assert [rows.grad is not None, weight.grad is not None] == list(needs)
