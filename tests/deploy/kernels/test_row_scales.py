from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.packed import GroupedInt
from deploy.kernels.reference import row_scales
from deploy.kernels.reference.model import ReferenceBackend
from deploy.kernels.reference.row_scales import RowScaledLinear, quantize_rows, round_to_grid, spread_copies
from deploy.runtime.backend import Row

GRIDS = [ActivationGrid(bits, scope) for bits in (4, 8) for scope in ("tensor", "token")]
STATIC = ActivationGrid(4, "tensor")


def clamp(value, low, high):
    return max(low, min(high, value))


def slow_codes(x, inputs):
    """One row of docs/numerics.md, element by element: codes and scale."""
    qmax = inputs.grid.qmax
    if inputs.scale is None:
        absmax = max(abs(v) for v in x)
        if absmax < 2.0**-100:
            return [0] * len(x), np.float32(0)
        inverse = np.float32(qmax) / absmax
        return [round(float(v * inverse)) for v in x], absmax / np.float32(qmax)  # round() is half to even
    inverse = np.float32(1) / np.float32(inputs.scale)
    with np.errstate(over="ignore"):
        codes = [round(clamp(float(v * inverse), -(2.0**23), 2.0**23)) for v in x]
    if inputs.flatten is None:
        return [clamp(c, -qmax, qmax) for c in codes], np.float32(inputs.scale)
    seen, copied = {}, []
    for channel in inputs.flatten.tolist():
        k = seen.get(channel, 0)
        seen[channel] = k + 1
        copied.append(clamp(codes[channel] - k * qmax, 0, qmax) + clamp(codes[channel] + k * qmax, -qmax, 0))
    return copied, np.float32(inputs.scale)


def slow_linear(exact_fma, x, weight, inputs, bias):
    """docs/numerics.md, one output at a time, in rationals."""
    out = np.empty((len(x), weight.shape[0]), dtype=np.float32)
    for row in range(len(x)):
        codes, scale_a = slow_codes(x[row], inputs)
        for n in range(weight.shape[0]):
            acc = np.float32(0)
            for group in range(weight.scale.shape[1]):
                columns = range(group * weight.group_size, (group + 1) * weight.group_size)
                zero = 0 if weight.zero_point is None else int(weight.zero_point[n, group])
                d = sum((int(weight.q[n, i]) - zero) * codes[i] for i in columns)
                acc = exact_fma(exact_fma(d, 1, 0), weight.scale[n, group], acc)
                if weight.zero_point is None:
                    acc = exact_fma(sum(codes[i] for i in columns), weight.minimum[n, group], acc)
            acc = acc * scale_a
            out[row, n] = acc if bias is None else acc + bias[n]
    return out


def rows(rng, count, width):
    x = (rng.standard_normal((count, width)) * 2.0 ** rng.integers(-6, 6, (count, width))).astype(np.float32)
    x[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    x[-1] *= np.float32(2.0**-120) if count > 2 else np.float32(1)
    return x


@pytest.mark.parametrize("form", ["symmetric", "asymmetric", "minimum"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.scope}")
@pytest.mark.parametrize(
    ("num_out", "num_in", "group_size", "bits", "expansion"),
    [(7, 96, 32, 4, 1.0), (3, 128, 64, 8, 1.5), (5, 160, None, 4, 1.2), (2, 96, None, 8, 1.0)],
)
def test_it_equals_the_slow_loop_bit_for_bit(
    exact_fma, tiny, monkeypatch, form, grid, num_out, num_in, group_size, bits, expansion
):
    monkeypatch.setattr(row_scales, "_BLOCK_OUT", 4)
    rng = np.random.default_rng(num_in + bits)
    kind = tiny.Quantized(bits, group_size, form, grid, expansion)
    inputs = tiny.inputs(rng, num_in, kind)
    width = num_in if inputs.flatten is None else inputs.flatten.size
    weight = tiny.grouped(rng, num_out, width, kind)
    x, bias = rows(rng, 4, num_in), rng.standard_normal(num_out).astype(np.float32)
    for b in (None, bias):
        expected = slow_linear(exact_fma, x, weight, inputs, b)
        assert np.array_equal(RowScaledLinear(weight, inputs, b)(x), expected)


def test_sums_beyond_24_bits_are_exact_until_they_are_rounded_once(exact_fma):
    q = np.full((2, 2048), 255, np.uint8)
    q[1, ::2] = 254
    weight = GroupedInt.from_zero_point(q, np.full((2, 1), 0.37, np.float32), 0, bits=8, group_size=2048)
    inputs, x = LayerInputs(ActivationGrid(8, "token")), np.full((1, 2048), 3.5, np.float32)
    x[0, 5] = 1.25
    expected = slow_linear(exact_fma, x, weight, inputs, None)
    assert np.array_equal(RowScaledLinear(weight, inputs)(x), expected)
    assert (255 * 127 * 2048) % 4 == 0  # and yet x[0, 5] makes the sum one that float32 lacks
    d = 255 * 127 * 2047 + 255 * 45
    assert Fraction(float(np.float32(d))) != d


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=32),
    st.lists(st.integers(-60, 60), min_size=32, max_size=32),
    st.sampled_from([4, 8]),
)
@settings(max_examples=80, deadline=None)
def test_copies_add_up_to_the_code_within_their_range_and_to_its_end_beyond(copies, codes, bits):
    counts = np.array((copies + [1] * 32)[:32])
    counts[-1] += -counts.sum() % 32
    qmax = (1 << (bits - 1)) - 1
    inputs = LayerInputs(ActivationGrid(bits, "tensor"), 0.25, np.repeat(np.arange(32), counts).astype(np.int32))
    row = np.array([codes], np.int32) * (qmax // 7)
    copied = spread_copies(row, inputs)
    assert np.abs(copied.astype(int)).max() <= qmax
    total = np.zeros(32, np.int64)
    np.add.at(total, inputs.flatten, copied[0])
    assert np.array_equal(total, np.clip(row[0], -counts * qmax, counts * qmax))


def test_flattening_changes_nothing_but_the_range(tiny):
    """The identity of FlattenQuant: with copied columns, y is as if a channel's codes had no limit."""
    rng = np.random.default_rng(5)
    counts = np.ones(64, np.int64)
    counts[[3, 17, 40]] = 12, 12, 11
    inputs = LayerInputs(STATIC, 0.25, np.repeat(np.arange(64), counts).astype(np.int32))
    x = rng.uniform(-1.6, 1.6, (5, 64)).astype(np.float32)
    x[:, [3, 17, 40]] *= np.float32(11)
    weight = tiny.grouped(rng, 9, 64, tiny.Quantized(8, None, "symmetric"))
    copied = GroupedInt.from_zero_point(
        np.ascontiguousarray(weight.q[:, inputs.flatten]), weight.scale, 128, bits=8, group_size=96
    )
    exact = round_to_grid(x, 0.25).astype(np.float64) * 0.25 @ weight.dequantize().astype(np.float64).T
    np.testing.assert_allclose(RowScaledLinear(copied, inputs)(x), exact, rtol=1e-6, atol=1e-6)
    cut = RowScaledLinear(weight, LayerInputs(STATIC, 0.25))(x)
    assert np.abs(cut - exact).max() > 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**126])
def test_the_ends_of_a_static_scale_give_codes(scale):
    x = np.array([[0, 1e-38, -1e-38, 1, -1, 3e38, -3e38] + [0] * 25], np.float32)
    for inputs in (LayerInputs(STATIC, scale), LayerInputs(STATIC, scale, np.arange(32, dtype=np.int32))):
        codes, _ = quantize_rows(x, inputs)
        assert codes.tolist() == [slow_codes(x[0], inputs)[0]]


def test_a_row_does_not_depend_on_its_company(tiny):
    rng = np.random.default_rng(9)
    for grid in GRIDS:
        kind = tiny.Quantized(4, None, "asymmetric", grid)
        layer = RowScaledLinear(tiny.grouped(rng, 70, 160, kind), tiny.inputs(rng, 160, kind))
        x = rng.standard_normal((37, 160)).astype(np.float32)
        assert np.array_equal(np.concatenate([layer(x[i : i + 1]) for i in range(37)]), layer(x))


def test_weights_that_do_not_fit_are_refused():
    inputs = LayerInputs(ActivationGrid(8, "token"))
    ones = np.ones((1, 4), np.float32)
    narrow = GroupedInt.from_zero_point(np.zeros((1, 64), np.uint8), ones, 8, bits=4, group_size=16)
    with pytest.raises(ValueError, match="group_size=16"):
        RowScaledLinear(narrow, inputs)
    wide = GroupedInt.from_zero_point(np.zeros((1, 65568), np.uint8), ones[:, :1], 8, bits=4, group_size=65568)
    with pytest.raises(ValueError, match="at most 65536"):
        RowScaledLinear(wide, inputs)


def test_a_model_computes_such_layers_alike_in_every_form(tmp_path, tiny):
    kinds = {
        "self_attn.[qkv]": tiny.Quantized(4, None, "symmetric", STATIC, 1.3),
        "": tiny.Quantized(8, None, "symmetric", ActivationGrid(8, "token")),
    }
    directory = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=False), kinds)
    rows = [Row(token, i, 0, i - 1) for i, token in enumerate([5, 17, 200, 3, 99])]
    forms = ("int8", "bf16", "float32")
    states = [ReferenceBackend(directory, activations=form).forward(rows, [1, 2]).taps for form in forms]
    for other in states[1:]:
        assert all(np.array_equal(states[0][layer], other[layer]) for layer in (1, 2))
