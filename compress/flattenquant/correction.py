"""Weights that make up for what rounding and cutting off take from a layer's inputs, in closed form.

GPTQ compares W'x̂ with Ŵ'x̂, both on quantized copies x̂, so what x lost on the way to x̂ is never made up for. The
asymmetric calibration of GPTAQ (arXiv 2504.02692) compares with the output that should be, Wx: here the weights V that
come nearest to it are found first, for all columns at once, and GPTQ then rounds those. That loses nothing, for where V
is the least-squares solution, Σ‖Wx − Ŵ'x̂‖² is Σ‖Vx̂ − Ŵ'x̂‖² and a constant.

Deviations: x is the layer's own input on quantized predecessors, not the unquantized model's, so that no second stream
of activations need be carried. Damping draws the weights to W' instead of 0: what calibration never filled stays as it
was. And since a few thousand rows fix a thousand columns badly, every layer's damping is GPTQ's or a multiple of it,
whichever helps half of the samples most when it is fitted on the other half; where none does, W' stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLES = (1.0, 10.0, 100.0)
"""Of GPTQ's damping, what a layer's correction may have."""


@dataclass(frozen=True)
class Products:
    """Sums over rows. H: Σ x̂·x̂ᵀ [C', C']; R: Σ r·x̂ᵀ [C, C'], r = x − each channel's copies, what those do not hold."""

    H: Tensor
    R: Tensor

    @classmethod
    def of(cls, x: Tensor, copies: Tensor, index: Tensor) -> Products:
        """x: [rows, C]; copies: x̂ [rows, C']; index: int64 [C'], the channel of each column."""
        lost = x - torch.zeros_like(x).index_add_(-1, index, copies)
        return cls(copies.T @ copies, lost.T @ copies)

    def __add__(self, other: Products) -> Products:
        return Products(self.H + other.H, self.R + other.R)


def best_dampening(W: Tensor, halves: tuple[Products, Products], dampenings: Sequence[float]) -> float | None:
    """The one of `dampenings` whose change gains most on the half on which it was not fitted; None where none gains.

    W: [out, C]; halves: of the same layer's rows. Raises torch.linalg.LinAlgError as `weight_change` does.
    """
    lost = [W @ each.R for each in halves]

    def crossed_gain(dampening: float) -> float:
        changes = [_least_squares(WR, each.H, dampening) for WR, each in zip(lost, halves, strict=True)]
        return _gain(lost[1], changes[0], halves[1].H) + _gain(lost[0], changes[1], halves[0].H)

    gains = {dampening: crossed_gain(dampening) for dampening in dampenings}
    best = max(gains, key=lambda each: gains[each])
    return best if gains[best] > 0 else None


def weight_change(W: Tensor, products: Products, dampening: float) -> Tensor:
    """D = W·R·(H + λI)⁻¹ [out, C'], which minimizes Σ‖Wx − (W' + D)·x̂‖² + λ·‖D‖².

    W: [out, C], of which W' has the repeated columns, so that Wx − W'x̂ = Wr. dampening: λ over the mean of H's
    diagonal, as of GPTQ. A column that no row filled is 0 in D.
    Raises torch.linalg.LinAlgError where H + λI has no Cholesky factor.
    """
    return _least_squares(W @ products.R, products.H, dampening)


def gain(W: Tensor, D: Tensor, products: Products) -> float:
    """Σ‖Wr‖² − Σ‖Wr − Dx̂‖²: by how much D lowers the squared output error over the rows of `products`."""
    return _gain(W @ products.R, D, products.H)


def _least_squares(WR: Tensor, H: Tensor, dampening: float) -> Tensor:
    damped = H.clone()
    damped.diagonal().add_(dampening * H.diagonal().mean())
    return torch.cholesky_solve(WR.T, torch.linalg.cholesky(damped)).T


def _gain(WR: Tensor, D: Tensor, H: Tensor) -> float:
    return float(2 * (D * WR).sum() - (D @ H * D).sum())
