"""The hand-written operations against torch's own, forwards, and against finite differences, backwards."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from train.elementwise import rms_normalize, rotate, swiglu


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_normalize_is_torchs_rms_norm_without_a_weight() -> None:
    x = random(5, 7) * 30
    torch.testing.assert_close(rms_normalize(x, 1e-3), functional.rms_norm(x, (7,), eps=1e-3))


def test_rms_normalize_has_the_gradient_of_finite_differences() -> None:
    assert gradcheck(lambda x: rms_normalize(x, 1e-2), random(3, 5).requires_grad_())


def test_rms_normalize_of_bfloat16_sums_in_float32() -> None:
    x = random(4, 577).bfloat16() * 100
    exact = functional.rms_norm(x.double(), (577,), eps=1e-5)
    torch.testing.assert_close(rms_normalize(x, 1e-5).double(), exact, rtol=2**-8, atol=1e-6)


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    gate_up = random(5, 14)
    torch.testing.assert_close(swiglu(gate_up), functional.silu(gate_up[:, :7]) * gate_up[:, 7:])


def test_swiglu_has_the_gradient_of_finite_differences() -> None:
    assert gradcheck(swiglu, random(3, 10).requires_grad_())


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_rotate_turns_each_pair_by_its_angle(is_contiguous: bool) -> None:
    x = random(5, 3, 8) if is_contiguous else random(5, 6, 8)[:, 2:5]
    angles = random(5, 1, 4, seed=1)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.cat([pairs.real, pairs.imag], -1))


def test_rotate_has_the_gradient_of_finite_differences() -> None:
    angles = random(2, 1, 3, seed=1)
    assert gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), random(2, 3, 6).requires_grad_())
