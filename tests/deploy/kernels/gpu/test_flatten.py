"""Activations as integers under a layer's own grid: the codes of docs/numerics.md, flattened or not."""

from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.kernels.gpu.flatten import pack_copies, quantize_flattened, quantize_flattened_reference
from deploy.kernels.gpu.w4a8 import linear_w4a8, pack_w4_channel
from deploy.kernels.gpu.w8a8 import (
    linear_w8a8,
    pack_w8,
    quantize_rows,
    quantize_rows_reference,
    quantize_static,
    quantize_static_reference,
)
from deploy.kernels.reference.row_scales import RowScaledLinear
from deploy.kernels.reference.row_scales import quantize_rows as codes_of_the_page

GRIDS = [ActivationGrid(bits, scope) for bits in (4, 8) for scope in ("tensor", "token")]


def rows(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Numbers of all magnitudes, ties among them; the last row is as good as zero."""
    x = (rng.standard_normal((count, channels)) * 2.0 ** rng.integers(-6, 6, (count, channels))).astype(np.float32)
    x[0, :6] = [1e30, 0.5, 1.5, -0.5, -2.5, -1e30]
    x[-1] *= np.float32(2.0**-120)
    return x


def codes_on(device: torch.device, x: torch.Tensor, inputs: LayerInputs, dtype: torch.dtype, *, kernels: bool) -> Any:
    bits, x = inputs.grid.bits, x.to(device)
    if inputs.scale is None:
        return (quantize_rows if kernels else quantize_rows_reference)(x, bits, dtype)
    scale = torch.tensor([inputs.scale], device=device)
    if inputs.flatten is None:
        return (quantize_static if kernels else quantize_static_reference)(x, scale, bits, dtype)
    flatten = quantize_flattened if kernels else quantize_flattened_reference
    return flatten(x, scale, pack_copies(inputs, device), dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.scope}")
def test_codes_and_scales_are_the_references(
    grid: ActivationGrid, of: torch.dtype, dtype: torch.dtype, tiny: Any, device: torch.device
) -> None:
    rng = np.random.default_rng(1)
    for expansion in (1.0,) if grid.scope == "token" else (1.0, 1.5):
        inputs = tiny.inputs(rng, 1120, tiny.Quantized(inputs=grid, expansion=expansion))
        x = torch.from_numpy(rows(rng, 4, 1120)).to(of)
        expected, scale = codes_of_the_page(x.to(torch.float32).numpy(), inputs)
        for kernels in (True, False):
            codes, scales = codes_on(device, x, inputs, dtype, kernels=kernels)
            assert codes.dtype == dtype
            np.testing.assert_array_equal(codes.to(torch.int32).cpu().numpy(), expected)
            np.testing.assert_array_equal(np.broadcast_to(scales.cpu().numpy(), scale.shape), scale)


@pytest.mark.parametrize("magnitude", [1.0, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**25])
def test_many_copies_of_one_channel_are_exact(magnitude: float, device: torch.device) -> None:
    """Codes of more than 22 bits round to even too, and the last copy of 65536 columns is full only beyond them."""
    flatten = np.concatenate([np.zeros(65535, np.int32), np.ones(1, np.int32)])
    inputs = LayerInputs(ActivationGrid(8, "tensor"), 1.0, flatten)
    x = np.array([[magnitude, 1.0], [-magnitude, -1.0]], np.float32)
    expected, _ = codes_of_the_page(x, inputs)
    codes, _ = codes_on(device, torch.from_numpy(x), inputs, torch.int8, kernels=True)
    np.testing.assert_array_equal(codes.cpu().numpy(), expected)


def test_what_is_not_a_number_becomes_a_code_of_the_grid(device: torch.device) -> None:
    inputs = LayerInputs(ActivationGrid(4, "tensor"), 0.5, np.sort(np.arange(32, dtype=np.int32) // 2))
    x = torch.full((1, 16), float("nan"))
    x[0, 1::2] = float("inf")
    codes, _ = codes_on(device, x, inputs, torch.int8, kernels=True)
    assert codes.abs().max().item() <= 7
    assert codes[0, 2:4].tolist() == [7, 7]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.scope}")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("count", "num_out", "num_in"), [(3, 70, 96), (17, 5, 1120)])
def test_layers_with_a_scale_per_output_are_the_reference_bit_for_bit(
    count: int,
    num_out: int,
    num_in: int,
    bits: int,
    grid: ActivationGrid,
    tiny: Any,
    make_per_output: Any,
    device: torch.device,
) -> None:
    """Also where sums are split (1120 inputs)."""
    rng = np.random.default_rng(2)
    inputs = tiny.inputs(rng, num_in, tiny.Quantized(inputs=grid, expansion=1.0 if grid.scope == "token" else 1.3))
    columns = num_in if inputs.flatten is None else inputs.flatten.size
    weight = make_per_output(rng, num_out, columns, bits)
    bias = rng.standard_normal(num_out).astype(np.float32)
    x = rows(rng, count, num_in)[1:]
    codes, scale = codes_on(device, torch.from_numpy(x), inputs, torch.int8, kernels=True)
    pack, linear = (pack_w8, linear_w8a8) if bits == 8 else (pack_w4_channel, linear_w4a8)
    y = linear(codes, scale, pack(weight, device, torch.from_numpy(bias)))
    np.testing.assert_array_equal(y.cpu().numpy(), RowScaledLinear(weight, inputs, bias)(x))


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    inputs = LayerInputs(ActivationGrid(4, "tensor"), 0.5, np.sort(np.arange(32, dtype=np.int32) // 2))
    copies, scale = pack_copies(inputs, device), torch.tensor([0.5], device=device)
    with pytest.raises(ValueError, match=r"x has shape \[2, 32\]; the layer reads \[rows, 16\]"):
        quantize_flattened(torch.zeros(2, 32, device=device), scale, copies)
    with pytest.raises(ValueError, match="a static scale is one float32"):
        quantize_flattened(torch.zeros(2, 16, device=device), scale.repeat(2), copies)
    with pytest.raises(ValueError, match="not flattened; use quantize_static or quantize_rows"):
        pack_copies(LayerInputs(ActivationGrid(8, "token")), device)
