"""Integer products with one scale per row and one per output: of 8-bit weights and of 4-bit ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu import epilogue, split_k
from deploy.kernels.gpu.w4a8 import linear_w4a8, linear_w4a8_reference, pack_w4_channel
from deploy.kernels.gpu.w8a8 import linear_w8a8, linear_w8a8_reference, pack_w8, quantize_rows, quantize_static


@dataclass(frozen=True)
class Product:
    bits: int
    pack: Any
    linear: Any
    reference: Any

    def inputs(self, num_in: int) -> int:
        """4-bit weights come in whole words of eight."""
        return num_in if self.bits == 8 else num_in // 8 * 8


@pytest.fixture(params=[8, 4], ids=["w8a8", "w4a8"])
def product(request: pytest.FixtureRequest) -> Product:
    if request.param == 8:
        return Product(8, pack_w8, linear_w8a8, linear_w8a8_reference)
    return Product(4, pack_w4_channel, linear_w4a8, linear_w4a8_reference)


def random_x(rows: int, num_in: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, num_in, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in"),
    [(1, 17, 96), (5, 70, 576), (17, 65, 100), (17, 65, 108), (65, 17, 96), (9, 33, 1100)],
)
def test_a_layer_is_exact(
    product: Product,
    rows: int,
    num_out: int,
    num_in: int,
    bits: int,
    out_dtype: torch.dtype,
    make_per_output: Any,
    device: torch.device,
) -> None:
    num_in = product.inputs(num_in)
    weight = make_per_output(np.random.default_rng(1), num_out, num_in, product.bits)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2))
    packed = product.pack(weight, device, bias)
    codes, scale = quantize_rows(random_x(rows, num_in, device), bits)
    y = product.linear(codes, scale, packed, out_dtype=out_dtype)
    assert torch.equal(y, product.reference(codes, scale, packed, out_dtype=out_dtype))
    dequantized = codes.cpu().double() * scale.cpu().double()[:, None]
    expected = dequantized @ torch.from_numpy(weight.dequantize()).double().T + bias
    accuracy = torch.finfo(out_dtype).eps
    torch.testing.assert_close(y.cpu().double(), expected, rtol=2 * accuracy, atol=1e-5)


@pytest.mark.parametrize("num_in", [576, 1100])
def test_a_row_alone_equals_the_row_in_any_bucket(
    product: Product, num_in: int, make_per_output: Any, device: torch.device
) -> None:
    num_in = product.inputs(num_in)
    packed = product.pack(make_per_output(np.random.default_rng(1), 40, num_in, product.bits), device)
    codes, scale = quantize_rows(random_x(70, num_in, device))
    alone = product.linear(codes[3:4], scale[3:4], packed)
    for rows in (16, 17, 64, 70):
        together = product.linear(codes[:rows].contiguous(), scale[:rows].contiguous(), packed)
        assert torch.equal(together[3:4], alone), f"{rows} rows"


@pytest.mark.parametrize("bits", [8, 4])
def test_one_scale_serves_all_rows_and_splitting_changes_nothing(
    product: Product, bits: int, make_per_output: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_in = product.inputs(1100)
    packed = product.pack(make_per_output(np.random.default_rng(1), 17, num_in, product.bits), device)
    static = torch.tensor([0.03 if bits == 8 else 0.3], device=device)
    codes, scale = quantize_static(random_x(5, num_in, device), static, bits)
    assert split_k.num_splits(17, 9) == 2
    split = product.linear(codes, scale, packed)
    monkeypatch.setattr(split_k, "TARGET_PROGRAMS", 1)
    assert torch.equal(split, product.linear(codes, scale, packed))
    assert torch.equal(split, product.linear(codes, scale.repeat(5), packed))


def test_activations_that_do_not_fit_are_refused_by_name(
    product: Product, make_per_output: Any, device: torch.device
) -> None:
    packed = product.pack(make_per_output(np.random.default_rng(1), 17, 96, product.bits), device)
    codes, scale = quantize_rows(random_x(3, 96, device))
    for linear in (product.linear, product.reference):
        with pytest.raises(ValueError, match=r"scale is torch.float32 \[2\]; 3 rows need float32 \[3\], or \[1\]"):
            linear(codes, scale[:2], packed)
        with pytest.raises(ValueError, match=r"x is torch.float32; use torch.int8"):
            linear(codes.float(), scale, packed)


def test_weights_that_do_not_fit_are_refused_by_name(
    product: Product, tiny: Any, make_per_output: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, bits = np.random.default_rng(1), product.bits

    def grouped(group_size: int, form: str) -> GroupedInt:
        found: GroupedInt = tiny.grouped(rng, 17, 96, tiny.Quantized(bits, group_size, form))
        return found

    with pytest.raises(ValueError, match=rf"{bits} bits in symmetric groups of 32 .* one symmetric scale per output"):
        product.pack(grouped(32, "symmetric"), device)
    with pytest.raises(ValueError, match=rf"{bits} bits in asymmetric groups of 32 .* use linear_w4a16"):
        product.pack(grouped(32, "asymmetric"), device)
    with pytest.raises(ValueError, match=rf"{bits} bits in asymmetric groups of 96"):
        product.pack(grouped(96, "minimum"), device)
    with pytest.raises(ValueError, match=f"need {bits} bits and one symmetric scale"):
        product.pack(make_per_output(rng, 17, 96, 12 - bits), device)
    monkeypatch.setattr(epilogue, "MAX_INPUTS", 64)
    with pytest.raises(ValueError, match="in_features=96 could overflow 32-bit sums"):
        product.pack(make_per_output(rng, 17, 96, bits), device)
