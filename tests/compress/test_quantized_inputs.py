"""Inputs quantized in torch: the codes of docs/numerics.md, written out here in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.quantized_inputs import InputQuantizedLinear, QuantizedInputs, linear_with
from deploy.formats.activations import ActivationGrid, LayerInputs


def rows(seed: int, channels: int = 37) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((23, channels)).astype(np.float32)
    x[:, 5] *= 30
    x[3] = 0
    x[4] *= np.float32(1e-33)
    return x


@pytest.mark.parametrize("bits", [4, 8])
def test_by_row_each_row_has_the_scale_of_its_largest_value(bits: int) -> None:
    x, qmax = rows(0), np.float32((1 << (bits - 1)) - 1)
    expected = np.zeros_like(x)
    for row, values in zip(expected, x, strict=True):
        a = np.abs(values).max()
        if a >= np.float32(2.0**-100):
            row[:] = np.rint(values * (qmax / a)) * (a / qmax)
    found = QuantizedInputs(LayerInputs(ActivationGrid(bits, "token")))(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert not expected[3].any() and not expected[4].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_by_layer_codes_saturate_at_the_static_scale(bits: int) -> None:
    x, qmax, scale = rows(1), (1 << (bits - 1)) - 1, np.float32(0.03)
    codes = np.clip(np.rint(x * (np.float32(1) / scale)), -qmax, qmax)
    quantize = QuantizedInputs(LayerInputs(ActivationGrid(bits, "tensor"), float(scale)))
    np.testing.assert_array_equal(quantize(torch.from_numpy(x)).numpy(), codes * scale)
    beyond = np.abs(np.rint(x * (np.float32(1) / scale))) > qmax
    assert beyond.any()
    np.testing.assert_array_equal(quantize.saturated(torch.from_numpy(x)).numpy(), beyond)


def test_flattened_inputs_are_the_contracts_copies() -> None:
    x, scale, qmax = rows(2, 30), np.float32(0.21), 7
    index = np.sort(np.append(np.arange(30), [5, 5])).astype(np.int32)
    c = np.rint(x * (np.float32(1) / scale))
    columns = []
    for place, channel in enumerate(index):
        k = int((index[:place] == channel).sum())
        positive = np.clip(c[:, channel] - k * qmax, 0, qmax)
        columns.append(positive + np.clip(c[:, channel] + k * qmax, -qmax, 0))
    quantize = QuantizedInputs(LayerInputs(ActivationGrid(4, "tensor"), float(scale), index))
    np.testing.assert_array_equal(quantize(torch.from_numpy(x)).numpy(), np.stack(columns, 1) * scale)
    limit = np.where(np.arange(30) == 5, 3 * qmax, qmax)
    np.testing.assert_array_equal(quantize.saturated(torch.from_numpy(x)).numpy(), np.abs(c) > limit)


def test_a_layer_keeps_its_bias_and_a_model_in_16_bits_its_type() -> None:
    inputs = LayerInputs(ActivationGrid(8, "tensor"), float(np.float32(0.01)))
    weight, bias, x = torch.eye(37), torch.arange(37.0), torch.from_numpy(rows(3))
    layer = InputQuantizedLinear(QuantizedInputs(inputs), linear_with(weight, bias))
    assert torch.equal(layer(x), layer.expand(x) + bias)
    halved = layer.to(torch.bfloat16)
    assert halved(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(halved.expand(x), QuantizedInputs(inputs)(x))
