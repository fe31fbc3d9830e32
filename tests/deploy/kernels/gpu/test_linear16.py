"""16-bit weights and activations, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deploy.kernels.gpu import split_k
from deploy.kernels.gpu.linear16 import linear_16, linear_16_reference

HALF_TYPES = [torch.float16, torch.bfloat16]
# fp32 sums of some hundred products, against float64.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}


def random_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in"), [(1, 17, 96), (5, 70, 576), (17, 65, 100), (65, 17, 96), (9, 33, 1100)]
)
def test_a_layer_equals_the_product(
    rows: int, num_out: int, num_in: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = random_matrix(rows, num_in, dtype, device), random_matrix(num_out, num_in, dtype, device, 1)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2)).to(device)
    y = linear_16(x, weight, bias, out_dtype=torch.float32)
    torch.testing.assert_close(y, linear_16_reference(x, weight, bias, out_dtype=torch.float32), **TOLERANCE)
    expected = x.cpu().double().numpy() @ weight.cpu().double().numpy().T + bias.cpu().double().numpy()
    torch.testing.assert_close(y.cpu().double(), torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("num_in", [96, 576, 1152])
def test_a_row_alone_equals_the_row_in_any_bucket(
    num_in: int, dtype: torch.dtype, device: torch.device, same_bits: Callable[..., list[int]]
) -> None:
    x, weight = random_matrix(70, num_in, dtype, device), random_matrix(40, num_in, dtype, device, 1)
    alone = torch.cat([linear_16(x[row : row + 1], weight, out_dtype=torch.float32) for row in (0, 3, 15)])
    for rows in same_bits(16, 17, 64, 70):
        together = linear_16(x[:rows].contiguous(), weight, out_dtype=torch.float32)
        assert torch.equal(together[[0, 3, 15]], alone), f"{rows} rows"


def test_a_split_sum_equals_an_unsplit_one_and_repeats_itself(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_matrix(3, 1100, torch.float16, device)
    weight, bias = random_matrix(17, 1100, torch.float16, device, 1), torch.arange(17.0, device=device)
    assert split_k.num_splits(17, 18) == 4
    split, again = (linear_16(x, weight, bias, out_dtype=torch.float32) for _ in range(2))
    monkeypatch.setattr(split_k, "TARGET_PROGRAMS", 1)
    assert torch.equal(split, again)
    torch.testing.assert_close(split, linear_16(x, weight, bias, out_dtype=torch.float32), **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("num_in", [96, 1152])
def test_the_bias_is_added_before_the_result_is_rounded(num_in: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random_matrix(3, num_in, dtype, device), random_matrix(17, num_in, dtype, device, 1)
    bias = torch.full((17,), 1000.0, device=device)
    assert torch.equal(linear_16(x, weight, bias), linear_16(x, weight, bias, out_dtype=torch.float32).to(dtype))


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    x, weight = random_matrix(3, 96, torch.float16, device), random_matrix(17, 96, torch.float16, device)
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 \[17, 96\]; linear_16 takes .* torch.float16"):
        linear_16(x, weight.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"x has shape \[3, 96\]; the layer reads \[rows, 48\]"):
        linear_16(x, weight[:, :48].contiguous())
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; the layer writes 17 outputs"):
        linear_16(x, weight, torch.zeros(3, device=device))
