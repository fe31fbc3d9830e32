"""Weights that make up for what their inputs lost: against least squares in float64, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.flattenquant.correction import Products, best_dampening, gain, weight_change
from compress.flattenquant.flatten import flatten_codes

C, OUT = 37, 11
INDEX = torch.repeat_interleave(torch.arange(C), torch.tensor([3, 2, *[1] * (C - 2)]))
THRESHOLD = 2.0


def rows(num_rows: int, seed: int, *, is_mixed: bool = True) -> Tensor:
    """[num_rows, C] in float64, a copy of few common directions where mixed; the first two channels are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, generator=generator, dtype=torch.float64)
    if is_mixed:
        common = torch.randn(5, C, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
        x = 0.3 * x + torch.randn(num_rows, 5, generator=generator, dtype=torch.float64) @ common
    x[:, :2] *= 2
    return x


def copies_of(x: Tensor) -> Tensor:
    step = THRESHOLD / 7
    return flatten_codes(torch.round(x / step), INDEX, 7) * step


def weight(seed: int = 3) -> Tensor:
    return torch.randn(OUT, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(x: Tensor) -> Products:
    return Products.of(x, copies_of(x), INDEX)


def squared_error(W: Tensor, V: Tensor, x: Tensor) -> float:
    """Σ over rows of ‖Wx − Vx̂‖²."""
    return sum(float((W @ row - V @ held).square().sum()) for row, held in zip(x, copies_of(x), strict=True))


def test_products_are_sums_over_rows_and_add_up() -> None:
    one, other = rows(19, 1), rows(13, 2)
    found = products(one) + products(other)
    H, R = torch.zeros(len(INDEX), len(INDEX)).double(), torch.zeros(C, len(INDEX)).double()
    for row in torch.cat([one, other]):
        held = copies_of(row[None])[0]
        lost = row.clone()
        for column, channel in enumerate(INDEX.tolist()):
            lost[channel] -= held[column]
        H += torch.outer(held, held)
        R += torch.outer(lost, held)
    torch.testing.assert_close(found.H, H)
    torch.testing.assert_close(found.R, R)


@pytest.mark.parametrize("dampening", [1e-4, 0.01, 3.0])
def test_the_change_is_the_damped_least_squares_solution(dampening: float) -> None:
    x, W = rows(301, 1), weight()
    found = products(x)
    damping = dampening * float(found.H.diagonal().mean())
    # The same by stacking: rows of x̂ beside √λ·I, what remains to be explained beside 0.
    held = copies_of(x)
    remains = x @ W.T - held @ W[:, INDEX].T
    stacked = torch.cat([held, damping**0.5 * torch.eye(len(INDEX), dtype=torch.float64)])
    wanted = torch.cat([remains, torch.zeros(len(INDEX), OUT, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T
    torch.testing.assert_close(weight_change(W, found, dampening), expected, rtol=1e-7, atol=1e-9)


def test_single_precision_gives_the_same_change() -> None:
    x, W = rows(301, 1), weight()
    exact = weight_change(W, products(x), 0.01)
    single = weight_change(W.float(), products(x.float()), 0.01)
    assert float((single - exact).norm() / exact.norm()) < 1e-3


def test_on_inputs_that_depend_on_each_other_unseen_rows_lose_less() -> None:
    x, unseen, W = rows(3001, 1), rows(301, 2), weight()
    V = W[:, INDEX] + weight_change(W, products(x), 0.01)
    assert squared_error(W, V, x) < 0.75 * squared_error(W, W[:, INDEX], x)
    assert squared_error(W, V, unseen) < 0.8 * squared_error(W, W[:, INDEX], unseen)


def test_the_gain_is_the_difference_of_squared_errors() -> None:
    x, W = rows(53, 1), weight()
    D = weight_change(W, products(rows(29, 2)), 0.1)
    expected = squared_error(W, W[:, INDEX], x) - squared_error(W, W[:, INDEX] + D, x)
    assert gain(W, D, products(x)) == pytest.approx(expected, rel=1e-9)


def test_a_column_that_was_never_filled_is_not_changed() -> None:
    x, W = rows(301, 1).clamp(-THRESHOLD, THRESHOLD), weight()  # so only first copies are ever filled
    change = weight_change(W, products(x), 0.01)
    is_first = torch.ones(len(INDEX), dtype=torch.bool)
    is_first[1:] = INDEX[1:] != INDEX[:-1]
    assert bool((change[:, ~is_first] == 0).all())
    assert bool((change[:, is_first] != 0).all())


def test_copies_that_are_always_alike_share_a_change() -> None:
    x, W = rows(301, 1), weight()
    x[:, 0] = 3 * THRESHOLD * x[:, 0].sign()  # three copies, all full
    change = weight_change(W, products(x), 0.01)
    torch.testing.assert_close(change[:, 0], change[:, 1])
    torch.testing.assert_close(change[:, 0], change[:, 2])


def test_without_damping_copies_that_are_always_alike_have_no_solution() -> None:
    x = rows(301, 1)
    x[:, 0] = 3 * THRESHOLD * x[:, 0].sign()
    with pytest.raises(torch.linalg.LinAlgError):
        weight_change(weight(), products(x), -1e-9)


def test_the_damping_is_the_one_that_serves_the_other_half_best() -> None:
    one, other, W = rows(301, 1), rows(401, 2), weight()
    halves, tried = (products(one), products(other)), (1e-6, 0.01, 0.1, 1.0, 30.0)

    def error(dampening: float) -> float:
        fitted = [W[:, INDEX] + weight_change(W, half, dampening) for half in halves]
        return squared_error(W, fitted[0], other) + squared_error(W, fitted[1], one)

    assert best_dampening(W, halves, tried) == min(tried, key=error)
    assert error(0.01) < squared_error(W, W[:, INDEX], one) + squared_error(W, W[:, INDEX], other)


def test_where_no_damping_gains_nothing_is_changed() -> None:
    few = [products(rows(15, seed, is_mixed=False)) for seed in (1, 2)]
    assert best_dampening(weight(), (few[0], few[1]), (0.001, 0.01)) is None
