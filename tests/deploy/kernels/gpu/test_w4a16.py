"""4-bit weights with 16-bit activations, against the weights as the file's own format dequantizes them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu import split_k
from deploy.kernels.gpu.w4a16 import dequantize_w4, linear_w4a16, linear_w4a16_reference, pack_w4

HALF_TYPES = [torch.float16, torch.bfloat16]
FORMS = ["symmetric", "asymmetric", "minimum"]
# fp32 sums of some hundred products, against float64.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}


def random_x(rows: int, num_in: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, num_in, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def random_weight(tiny: Any, num_out: int, num_in: int, group_size: int, form: str) -> GroupedInt:
    return tiny.grouped(np.random.default_rng(1), num_out, num_in, tiny.Quantized(4, group_size, form))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "group_size"),
    [(1, 17, 96, 32), (5, 70, 576, 64), (17, 65, 576, 32), (3, 40, 384, 128), (65, 17, 96, 32), (7, 33, 1152, 64)],
)
def test_a_layer_equals_its_dequantized_weights(
    rows: int,
    num_out: int,
    num_in: int,
    group_size: int,
    form: str,
    dtype: torch.dtype,
    tiny: Any,
    device: torch.device,
) -> None:
    weight = random_weight(tiny, num_out, num_in, group_size, form)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2))
    x = random_x(rows, num_in, dtype, device)
    y = linear_w4a16(x, pack_w4(weight, device, dtype, bias), out_dtype=torch.float32)
    rounded = torch.from_numpy(weight.dequantize()).to(dtype).to(torch.float64)
    expected = x.cpu().to(torch.float64) @ rounded.T + bias
    torch.testing.assert_close(y.cpu(), expected.to(torch.float32), **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_loses_nothing(group_size: int, form: str, tiny: Any) -> None:
    weight = random_weight(tiny, 17, 384, group_size, form)
    for dtype in HALF_TYPES:
        assert torch.equal(dequantize_w4(pack_w4(weight, "cpu", dtype)), torch.from_numpy(weight.dequantize()))


def test_scales_take_the_first_type_that_changes_none(tiny: Any) -> None:
    bfloat16 = random_weight(tiny, 5, 96, 32, "asymmetric")
    assert pack_w4(bfloat16, "cpu", torch.bfloat16).scale.dtype == torch.bfloat16
    assert pack_w4(bfloat16, "cpu", torch.float16).scale.dtype == torch.float16
    small = GroupedInt.from_zero_point(bfloat16.q, bfloat16.scale * np.float32(2**-30), 8, bits=4, group_size=32)
    assert pack_w4(small, "cpu", torch.float16).scale.dtype == torch.bfloat16
    free = GroupedInt.from_zero_point(bfloat16.q, bfloat16.scale / np.float32(3), 8, bits=4, group_size=32)
    assert pack_w4(free, "cpu", torch.bfloat16).scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_scales_of_another_type_are_multiplied_in_fp32(dtype: torch.dtype, tiny: Any, device: torch.device) -> None:
    q = random_weight(tiny, 17, 192, 64, "symmetric").q
    scale = np.random.default_rng(3).uniform(0.01, 0.02, (17, 3)).astype(np.float32)
    weight = GroupedInt.from_zero_point(q, scale, 8, bits=4, group_size=64)
    x, packed = random_x(4, 192, dtype, device), pack_w4(weight, device, dtype)
    assert packed.scale.dtype == torch.float32
    y = linear_w4a16(x, packed, out_dtype=torch.float32)
    torch.testing.assert_close(y, linear_w4a16_reference(x, packed, out_dtype=torch.float32), **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("num_in", "group_size"), [(576, 64), (1152, 128)])
def test_a_row_alone_equals_the_row_in_any_bucket(
    num_in: int,
    group_size: int,
    dtype: torch.dtype,
    tiny: Any,
    device: torch.device,
    same_bits: Callable[..., list[int]],
) -> None:
    packed = pack_w4(random_weight(tiny, 40, num_in, group_size, "asymmetric"), device, dtype)
    x = random_x(70, num_in, dtype, device)
    alone = torch.cat([linear_w4a16(x[row : row + 1], packed, out_dtype=torch.float32) for row in (0, 3, 15)])
    for rows in same_bits(16, 17, 64, 70):
        together = linear_w4a16(x[:rows].contiguous(), packed, out_dtype=torch.float32)
        assert torch.equal(together[[0, 3, 15]], alone), f"{rows} rows"


def test_a_split_sum_equals_an_unsplit_one_and_repeats_itself(
    tiny: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_w4(random_weight(tiny, 17, 2304, 64, "asymmetric"), device, torch.float16)
    x = random_x(3, 2304, torch.float16, device)
    assert split_k.num_splits(17, 18) == 4
    split, again = (linear_w4a16(x, packed, out_dtype=torch.float32) for _ in range(2))
    monkeypatch.setattr(split_k, "TARGET_PROGRAMS", 1)
    assert split_k.num_splits(17, 18) == 1
    assert torch.equal(split, again)
    torch.testing.assert_close(split, linear_w4a16(x, packed, out_dtype=torch.float32), **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("num_in", [96, 1152])
def test_the_bias_is_added_before_the_result_is_rounded(
    num_in: int, dtype: torch.dtype, tiny: Any, device: torch.device
) -> None:
    bias = torch.full((17,), 1000.0)
    packed = pack_w4(random_weight(tiny, 17, num_in, 32, "symmetric"), device, dtype, bias)
    x = random_x(3, num_in, dtype, device)
    assert torch.equal(linear_w4a16(x, packed), linear_w4a16(x, packed, out_dtype=torch.float32).to(dtype))


def test_a_given_output_is_written_in_its_own_type(tiny: Any, device: torch.device) -> None:
    packed = pack_w4(random_weight(tiny, 17, 96, 32, "symmetric"), device, torch.float16)
    x, out = random_x(3, 96, torch.float16, device), torch.empty(3, 17, device=device)
    assert linear_w4a16(x, packed, out) is out
    assert torch.equal(out, linear_w4a16(x, packed, out_dtype=torch.float32))


def test_what_does_not_fit_is_refused_by_name(tiny: Any, make_per_output: Any, device: torch.device) -> None:
    packed = pack_w4(random_weight(tiny, 17, 96, 32, "symmetric"), device, torch.float16)
    x = random_x(3, 96, torch.float16, device)
    with pytest.raises(ValueError, match=r"x has shape \[3, 48\]; the layer reads \[rows, 96\]"):
        linear_w4a16(x[:, :48].contiguous(), packed)
    with pytest.raises(ValueError, match="of at least one row"):
        linear_w4a16(x[:0], packed)
    with pytest.raises(ValueError, match="make it contiguous"):
        linear_w4a16(random_x(96, 3, torch.float16, device).T, packed)
    with pytest.raises(ValueError, match=r"x is torch.float32; use torch.float16 or torch.bfloat16"):
        linear_w4a16(x.float(), packed)
    with pytest.raises(ValueError, match=r"out is torch.float16 \[3, 16\]"):
        linear_w4a16(x, packed, torch.empty(3, 16, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match=r"out_dtype=torch.float64 is not supported"):
        linear_w4a16(x, packed, out_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bits=8 in groups of 96 do not fit linear_w4a16"):
        pack_w4(make_per_output(np.random.default_rng(0), 4, 96, 8), device)
