"""Native linear layers with one scale a row against the numpy definition, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.packed import GroupedInt, encode
from deploy.formats.safetensors_file import BFloat16
from deploy.kernels.cpu.library import Matrix, Runtime, SourceWeights
from deploy.kernels.reference.row_scales import RowScaledLinear

KINDS = {
    "4-bit, flattened": (4, ActivationGrid(4, "tensor"), 1.3),
    "4-bit, static": (4, ActivationGrid(8, "tensor"), 1.0),
    "4-bit, dynamic": (4, ActivationGrid(8, "token"), 1.0),
    "8-bit, flattened": (8, ActivationGrid(8, "tensor"), 1.1),
    "8-bit, dynamic": (8, ActivationGrid(8, "token"), 1.0),
    "8-bit, dynamic 4": (8, ActivationGrid(4, "token"), 1.0),
}


def source_of(weight, inputs, *, symmetric, bias=None, dtype=None):
    """A layer as a file would hold it."""
    dtype = dtype or ("F16" if weight.zero_point is None else "BF16")
    tensors = encode("w", weight, dtype, symmetric=symmetric, inputs=inputs)

    def raw(name):
        value = tensors.get(f"w.{name}")
        return value.bits if isinstance(value, BFloat16) else value

    is_bytes = "w.weight" in tensors
    minimum = raw("weight_min") if weight.zero_point is None else raw("weight_zero_point")
    return SourceWeights(
        weight.shape, raw("weight") if is_bytes else raw("weight_packed"), dtype, raw("weight_scale"), minimum,
        weight.bits, weight.group_size, weight.zero_point is None, bias, is_bytes=is_bytes, inputs=inputs,
    )  # fmt: skip


def layer(tiny, seed, num_out, num_in, group_size, form, kind):
    bits, grid, expansion = kind
    rng = np.random.default_rng(seed)
    quantized = tiny.Quantized(bits, group_size, form, grid, expansion)
    inputs = tiny.inputs(rng, num_in, quantized)
    columns = num_in if inputs.flatten is None else inputs.flatten.size
    return tiny.grouped(rng, num_out, columns, quantized), inputs


def rows_of(rng, rows, num_in):
    """Rows of very different sizes, with a zero row, a subnormal one, large numbers, and ties in rounding."""
    x = rng.standard_normal((rows, num_in)).astype(np.float32) * np.float32(4) ** rng.integers(-3, 3, (rows, 1))
    x = x.astype(np.float32)
    x[0, :4] = [1e30, -1e30, 1e9, -1e9]
    x[rows // 2, :32] = 0.5
    x[rows // 2, 3] = 127
    if rows > 4:
        x[1], x[2], x[3] = 0, 1e-40, -1e-25
    return x


@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "minimum"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("num_out", "num_in", "group_size"), [(17, 96, 32), (40, 128, 64), (33, 2304, None), (1, 32, None), (64, 384, 128)]
)
def test_a_layer_is_the_definition(runtime, tiny, num_out, num_in, group_size, form, kind):
    if kind[2] != 1.0 and group_size == 128:
        kind = (*kind[:2], 4 / 3)
    if kind[2] != 1.0 and group_size == 64:
        kind = (*kind[:2], 1.5)
    weight, inputs = layer(tiny, num_out, num_out, num_in, group_size, form, kind)
    bias = np.random.default_rng(1).standard_normal(num_out).astype(np.float32)
    matrix = Matrix(runtime, source_of(weight, inputs, symmetric=form == "symmetric", bias=bias))
    expected = RowScaledLinear(weight, inputs, bias)
    rng = np.random.default_rng(2)
    for rows in (1, 2, 5, 6, 7, 13, 33):
        x = rows_of(rng, rows, num_in)
        np.testing.assert_array_equal(matrix.multiply(x), expected(x))


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("kind", [KINDS["4-bit, flattened"], KINDS["8-bit, dynamic"]], ids=["flattened", "dynamic"])
def test_every_number_of_rows_gives_the_same_row(runtime, tiny, group_size, kind):
    weight, inputs = layer(tiny, 3, 50, 160, group_size, "asymmetric", kind)
    matrix = Matrix(runtime, source_of(weight, inputs, symmetric=False))
    x = rows_of(np.random.default_rng(4), 512, 160)
    alone = np.concatenate([matrix.multiply(x[i : i + 1]) for i in range(40)])
    for rows in [*range(1, 41), 128, 512]:
        np.testing.assert_array_equal(matrix.multiply(x[:rows])[:40], alone[:rows])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("group_size", [64, None])
def test_scales_may_come_in_every_type(runtime, tiny, dtype, group_size):
    weight, inputs = layer(tiny, 5, 40, 128, group_size, "asymmetric", KINDS["8-bit, dynamic"])
    x = rows_of(np.random.default_rng(4), 6, 128)
    matrix = Matrix(runtime, source_of(weight, inputs, symmetric=False, dtype=dtype))
    np.testing.assert_array_equal(matrix.multiply(x), RowScaledLinear(weight, inputs)(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", ["least", "most"])
def test_the_largest_sums_do_not_overflow(runtime, bits, code):
    """As many columns as there may be, every product at its limit."""
    most = (1 << bits) - 1
    q = np.full((3, 65536), 0 if code == "least" else most, dtype=np.uint8)
    ones, grid = np.full((3, 1), 0.7, dtype=np.float32), ActivationGrid(8, "token")
    x = np.concatenate([np.ones((1, 65536)), -np.ones((1, 65536))]).astype(np.float32)
    for zero in (0, 1, most):
        weight = GroupedInt.from_zero_point(q, ones, zero, bits=bits, group_size=65536)
        matrix = Matrix(runtime, source_of(weight, LayerInputs(grid), symmetric=False, dtype="F32"))
        np.testing.assert_array_equal(matrix.multiply(x), RowScaledLinear(weight, LayerInputs(grid))(x))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(runtime, tiny, threads):
    weight, inputs = layer(tiny, 9, 330, 96, None, "symmetric", KINDS["4-bit, flattened"])
    source = source_of(weight, inputs, symmetric=True)
    x = rows_of(np.random.default_rng(4), 8, 96)
    other = Matrix(Runtime(threads=threads, isa=runtime.isa), source)
    np.testing.assert_array_equal(other.multiply(x), Matrix(runtime, source).multiply(x))


def hostile_inputs(**changes):
    """Inputs that `LayerInputs` would refuse."""
    inputs = LayerInputs(ActivationGrid(4, "tensor"), 0.5, np.arange(64, dtype=np.int32))
    for name, value in changes.items():
        object.__setattr__(inputs, name, value)
    return inputs


def flatten_of(*ends):
    flatten = np.arange(64, dtype=np.int32)
    flatten[-len(ends) :] = ends
    return flatten


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": -1.0}, "positive normal"),
        ({"scale": float("nan")}, "positive normal"),
        ({"scale": float("inf")}, "positive normal"),
        ({"scale": 1e-40}, "positive normal"),
        ({"scale": 0.0}, "need an input scale"),
        ({"flatten": flatten_of(1000000)}, "every channel"),
        ({"flatten": flatten_of(-5)}, "every channel"),
        ({"flatten": flatten_of(62, 61)}, "every channel"),
        ({"flatten": np.full(64, -1, np.int32)}, "every channel"),
        ({"flatten": np.full(64, -(2**31), np.int32)}, "every channel"),
        ({"flatten": flatten_of(62)}, "multiple of 32"),
    ],
)
def test_inputs_that_would_read_elsewhere_are_refused(runtime, tiny, changes, reason):
    weight = tiny.grouped(np.random.default_rng(0), 4, 64, tiny.Quantized(4, None, "symmetric"))
    good = LayerInputs(ActivationGrid(4, "tensor"), 0.5, np.arange(64, dtype=np.int32))
    source = replace(source_of(weight, good, symmetric=True), inputs=hostile_inputs(**changes))
    with pytest.raises(ValueError, match=reason):
        Matrix(runtime, source)


def test_other_weights_that_do_not_fit_are_refused(runtime, tiny):
    weight = tiny.grouped(np.random.default_rng(0), 4, 96, tiny.Quantized(4, None, "symmetric"))
    token = LayerInputs(ActivationGrid(8, "token"))
    source = source_of(weight, token, symmetric=True)
    with pytest.raises(ValueError, match="group_size=96"):
        Matrix(runtime, replace(source, inputs=None))
    with pytest.raises(ValueError, match="does not divide"):
        Matrix(runtime, replace(source, group_size=-96))
    with pytest.raises(ValueError, match="8-bit codes only"):
        Matrix(runtime, replace(source, is_bytes=True))
    wide = np.zeros((1, 65568 // 8), np.int32)
    with pytest.raises(ValueError, match="more than 65536"):
        Matrix(runtime, replace(source, shape=(1, 65568), codes=wide, group_size=65568))
    with pytest.raises(ValueError, match="not finite"):
        Matrix(runtime, replace(source, scale=np.full((4, 1), 0x7F80, np.uint16)))
    plain = SourceWeights((4, 32), np.zeros((4, 32), np.float32), "F32", inputs=token)
    with pytest.raises(ValueError, match="inputs of 8 bits"):
        Matrix(runtime, plain)
