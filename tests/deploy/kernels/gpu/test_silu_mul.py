import pytest
import torch

from deploy.kernels.gpu.silu_mul import silu_mul, silu_mul_reference
from deploy.kernels.reference.fp32 import silu32

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(rows, inter, dtype, device):
    generator = torch.Generator().manual_seed(rows * 1000 + inter)
    return (torch.randn(rows, 2 * inter, generator=generator) * 4).to(device, dtype)


@pytest.mark.parametrize(("rows", "inter"), [(1, 1536), (5, 160), (3, 33)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_equals_its_definition(device, rows, inter, dtype):
    gate_up = make(rows, inter, dtype, device)
    ours = silu_mul(gate_up)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, silu_mul_reference(gate_up), rtol=TOLERANCE[dtype], atol=1e-6)


def test_it_is_near_the_page_on_numerics(device):
    gate_up = make(3, 160, torch.float32, device)
    gate, up = gate_up.cpu().numpy()[:, :160], gate_up.cpu().numpy()[:, 160:]
    torch.testing.assert_close(silu_mul(gate_up).cpu(), torch.from_numpy(silu32(gate) * up), rtol=2e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's
def test_far_from_zero_it_is_the_gate_or_nothing(device):
    gate_up = torch.tensor([[200.0, -200.0, 3.0, 3.0]], device=device)
    assert silu_mul(gate_up).tolist() == [[600.0, 0.0]]


def test_it_writes_where_it_is_told(device):
    gate_up = make(2, 40, torch.float16, device)
    out = torch.empty(2, 40, dtype=torch.float16, device=device)
    assert silu_mul(gate_up, out) is out
    assert torch.equal(out, silu_mul(gate_up))


def test_a_row_is_the_same_whatever_is_beside_it(device):
    gate_up = make(6, 96, torch.float16, device)
    together = silu_mul(gate_up)
    for row in range(6):
        assert torch.equal(silu_mul(gate_up[row : row + 1].contiguous())[0], together[row])
