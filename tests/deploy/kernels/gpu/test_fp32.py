import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from deploy.kernels.gpu.fp32 import exp32, log32
from deploy.kernels.reference import fp32 as reference


@triton.jit
def _exp_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, exp32(tl.load(x_ptr + index)))


@triton.jit
def _log_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, log32(tl.load(x_ptr + index)))


def run(kernel, x, device):
    on_device = torch.from_numpy(x).to(device)
    y = torch.empty_like(on_device)
    kernel[(len(x) // 1024,)](on_device, y, BLOCK=1024, enable_fp_fusion=False)
    return y.cpu().numpy()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_exp_gives_the_bits_of_the_page_on_numerics(device):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-95, 95, 8192), 3 * rng.standard_normal(8192)]).astype(np.float32)
    x[:8] = (0, -87.3, -87.31, 88, 88.01, -np.inf, np.inf, -0.0)
    assert np.array_equal(run(_exp_kernel, x, device), reference.exp32(x))


def test_log_gives_the_bits_of_the_page_on_numerics(device):
    rng = np.random.default_rng(1)
    uniform = (rng.integers(0, 1 << 23, 8192).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    x = np.concatenate([uniform, -reference.log32(uniform)])
    assert np.array_equal(run(_log_kernel, x, device), reference.log32(x))
