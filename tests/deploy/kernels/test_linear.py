import numpy as np
import pytest

from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16
from deploy.kernels.reference import linear
from deploy.kernels.reference.linear import FloatLinear, Int8Linear, quantize_groups


def slow_quantize(x):
    """One group of 32, element by element."""
    absmax = max(abs(v) for v in x)
    if absmax < 2.0**-100:
        return [0] * 32, np.float32(0)
    inverse = np.float32(127) / absmax
    return [round(float(v * inverse)) for v in x], absmax / np.float32(127)  # round() is half to even


def slow_linear(exact_fma, x, q, scale, minimum, group_size, bias):
    """docs/numerics.md, one output at a time."""
    out = np.empty((len(x), len(q)), dtype=np.float32)
    for row in range(len(x)):
        groups = [slow_quantize(x[row, g : g + 32]) for g in range(0, x.shape[1], 32)]
        for n in range(len(q)):
            acc = np.float32(0)
            for g, (codes, scale_a) in enumerate(groups):
                weight_group = g * 32 // group_size
                dot = sum(int(w) * a for w, a in zip(q[n, g * 32 : g * 32 + 32], codes, strict=True))
                acc = exact_fma(np.float32(dot) * scale_a, scale[n, weight_group], acc)
                if minimum is not None:
                    acc = exact_fma(scale_a * np.float32(sum(codes)), minimum[n, weight_group], acc)
            out[row, n] = acc if bias is None else acc + bias[n]
    return out


@pytest.mark.parametrize("form", ["symmetric", "asymmetric", "minimum"])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "group_size", "bits"),
    [(1, 17, 96, 32, 4), (5, 3, 128, 64, 4), (3, 7, 256, 128, 8), (2, 1, 32, 32, 8)],
)
def test_int8_equals_the_slow_loop_bit_for_bit(exact_fma, tiny, form, rows, num_out, num_in, group_size, bits):
    rng = np.random.default_rng(num_in + rows)
    weight = tiny.grouped(rng, num_out, num_in, tiny.Quantized(bits, group_size, form))
    x = (rng.standard_normal((rows, num_in)) * 2.0 ** rng.integers(-6, 6, (rows, num_in))).astype(np.float32)
    x[0, :32] = 0
    x[-1, -32:] *= np.float32(2.0**-120)
    bias = rng.standard_normal(num_out).astype(np.float32)
    for b in (None, bias):
        expected = slow_linear(exact_fma, x, weight.q, weight.scale, weight.minimum, group_size, b)
        assert np.array_equal(Int8Linear.from_grouped(weight, b)(x), expected)


def test_a_plain_weight_is_quantized_as_documented(exact_fma):
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((5, 64)).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float32)
    rows = [[slow_quantize(row[g : g + 32]) for g in (0, 32)] for row in weight]
    q = np.array([[code for codes, _ in row for code in codes] for row in rows])
    scale = np.array([[s for _, s in row] for row in rows], dtype=np.float32)
    expected = slow_linear(exact_fma, x, q, scale, None, 32, None)
    assert np.array_equal(Int8Linear.from_float(weight)(x), expected)


def test_int8_is_near_the_unquantized_product(tiny):
    rng = np.random.default_rng(3)
    weight = tiny.grouped(rng, 33, 320, tiny.Quantized())
    x = rng.standard_normal((4, 320)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    assert np.abs(Int8Linear.from_grouped(weight)(x) - exact).max() < 0.02 * np.abs(exact).max()


def test_ties_in_quantization_go_to_even():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    codes, scale = quantize_groups(x)
    assert scale[0, 0] == 1
    assert codes[0, :5].tolist() == [127, 0, 2, 0, -2]


@pytest.mark.parametrize("make", ["int8", "bf16", "float32"])
def test_a_row_does_not_depend_on_its_company(tiny, make, monkeypatch):
    rng = np.random.default_rng(9)
    weight = tiny.grouped(rng, 70, 160, tiny.Quantized())
    build = {
        "int8": lambda: Int8Linear.from_grouped(weight),
        "bf16": lambda: FloatLinear(weight.dequantize(), None, is_rounded=True),
        "float32": lambda: FloatLinear(weight.dequantize(), None, is_rounded=False),
    }[make]
    x = rng.standard_normal((37, 160)).astype(np.float32)
    whole = build()(x)
    assert np.array_equal(np.concatenate([build()(x[i : i + 1]) for i in range(37)]), whole)
    monkeypatch.setattr(linear, "_BLOCK_OUT", 16)
    monkeypatch.setattr(linear, "_BLOCK_ELEMENTS", 300)
    assert np.array_equal(build()(x[::-1])[::-1], whole)


def test_16_bit_rounds_inputs_and_weights_to_bfloat16():
    rng = np.random.default_rng(4)
    weight, x = rng.standard_normal((9, 64)).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float32)
    rounded = [from_bfloat16(to_bfloat16(v)).astype(np.float64) for v in (x, weight)]
    exact = rounded[0] @ rounded[1].T
    assert np.allclose(FloatLinear(weight, None, is_rounded=True)(x), exact, rtol=0, atol=64 * 2.0**-24 * 20)


def test_widths_that_are_not_whole_groups_are_refused():
    with pytest.raises(ValueError, match="in_features=40"):
        Int8Linear.from_float(np.ones((2, 40), np.float32))
    weight = GroupedInt.from_zero_point(
        np.zeros((2, 64), np.uint8), np.ones((2, 4), np.float32), 8, bits=4, group_size=16
    )
    with pytest.raises(ValueError, match="group_size=16"):
        Int8Linear.from_grouped(weight)
