import numpy as np
import pytest
import torch

from deploy.kernels.gpu.rms_norm import CONFIGS, add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from deploy.kernels.reference.layers import rms_norm as numpy_rms_norm

EPS = 1e-5


def make(rows, n, device):
    generator = torch.Generator().manual_seed(rows * 1000 + n)
    x = torch.randn(rows, n, generator=generator) * 3
    return x.to(device), torch.randn(n, generator=generator).to(device)


@pytest.mark.parametrize(("rows", "n"), [(1, 576), (5, 96), (3, 1536), (7, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_equals_its_definition(device, rows, n, dtype):
    x, weight = make(rows, n, device)
    ours = rms_norm(x, weight, EPS, dtype)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(ours, rms_norm_reference(x, weight, EPS, dtype), rtol=tolerance, atol=1e-6)


def test_it_is_near_the_page_on_numerics(device):
    x, weight = make(4, 576, device)
    expected = numpy_rms_norm(x.cpu().numpy(), weight.cpu().numpy(), EPS)
    assert np.allclose(rms_norm(x, weight, EPS, torch.float32).cpu().numpy(), expected, rtol=2e-6, atol=1e-7)


def test_a_row_of_zeros_gives_zeros(device):
    weight = torch.ones(64, device=device)
    assert torch.equal(
        rms_norm(torch.zeros(1, 64, device=device), weight, EPS, torch.float32), torch.zeros(1, 64, device=device)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adding_first_updates_the_residual_in_place(device, dtype):
    residual, weight = make(5, 96, device)
    delta = make(5, 96, device)[0].flip(0).contiguous().to(dtype)
    expected_residual = residual.clone()
    expected = add_rms_norm_reference(expected_residual, delta, weight, EPS, torch.float32)
    ours = add_rms_norm(residual, delta, weight, EPS, torch.float32)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-6)


def test_a_row_is_the_same_whatever_is_beside_it(device):
    x, weight = make(9, 576, device)
    together = rms_norm(x, weight, EPS, torch.float16)
    for row in range(9):
        assert torch.equal(rms_norm(x[row : row + 1].contiguous(), weight, EPS, torch.float16)[0], together[row])


def test_a_row_longer_than_the_table_is_refused(device):
    n = max(CONFIGS) + 1
    with pytest.raises(ValueError, match=f"{n} elements"):
        rms_norm(torch.zeros(1, n, device=device), torch.ones(n, device=device), EPS, torch.float32)
