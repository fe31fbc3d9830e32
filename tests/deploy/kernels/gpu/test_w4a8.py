"""4-bit weights with 8- and 4-bit activations."""

from typing import Any

import numpy as np
import pytest
import torch

from deploy.kernels.gpu import split_k
from deploy.kernels.gpu.w4a8 import linear_w4a8, linear_w4a8_reference, pack_w4_channel
from deploy.kernels.gpu.w8a8 import quantize_rows, quantize_static


def random_x(rows: int, num_in: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, num_in, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in"), [(1, 17, 96), (5, 70, 576), (17, 65, 104), (65, 17, 96), (9, 33, 1096)]
)
def test_a_layer_is_exact(
    rows: int, num_out: int, num_in: int, bits: int, out_dtype: torch.dtype, make_per_output: Any, device: torch.device
) -> None:
    weight = make_per_output(np.random.default_rng(1), num_out, num_in, 4)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2))
    packed = pack_w4_channel(weight, device, bias)
    codes, scale = quantize_rows(random_x(rows, num_in, device), bits)
    y = linear_w4a8(codes, scale, packed, out_dtype=out_dtype)
    assert torch.equal(y, linear_w4a8_reference(codes, scale, packed, out_dtype=out_dtype))
    dequantized = codes.cpu().double() * scale.cpu().double()[:, None]
    expected = dequantized @ torch.from_numpy(weight.dequantize()).double().T + bias
    accuracy = torch.finfo(out_dtype).eps
    torch.testing.assert_close(y.cpu().double(), expected, rtol=2 * accuracy, atol=1e-5)


def test_a_row_alone_equals_the_row_in_any_bucket(make_per_output: Any, device: torch.device) -> None:
    packed = pack_w4_channel(make_per_output(np.random.default_rng(1), 40, 1096, 4), device)
    codes, scale = quantize_rows(random_x(70, 1096, device))
    alone = linear_w4a8(codes[3:4], scale[3:4], packed)
    for rows in (16, 17, 64, 70):
        together = linear_w4a8(codes[:rows].contiguous(), scale[:rows].contiguous(), packed)
        assert torch.equal(together[3:4], alone), f"{rows} rows"


def test_one_scale_serves_all_rows_and_splitting_changes_nothing(
    make_per_output: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_w4_channel(make_per_output(np.random.default_rng(1), 17, 1096, 4), device)
    codes, scale = quantize_static(random_x(5, 1096, device), torch.tensor([0.3], device=device), bits=4)
    assert split_k.num_splits(17, 9) == 2
    split = linear_w4a8(codes, scale, packed)
    monkeypatch.setattr(split_k, "TARGET_PROGRAMS", 1)
    assert torch.equal(split, linear_w4a8(codes, scale, packed))
    assert torch.equal(split, linear_w4a8(codes, scale.repeat(5), packed))


def test_a_weight_in_groups_is_refused_by_name(tiny: Any, make_per_output: Any, device: torch.device) -> None:
    rng = np.random.default_rng(1)
    with pytest.raises(ValueError, match=r"4 bits in asymmetric groups of 32 .* use linear_w4a16"):
        pack_w4_channel(tiny.grouped(rng, 17, 96, tiny.Quantized(4, 32, "asymmetric")), device)
    with pytest.raises(ValueError, match="need 4 bits and one symmetric scale"):
        pack_w4_channel(make_per_output(rng, 17, 96, 8), device)
