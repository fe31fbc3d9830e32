"""Native linear layers against the numpy definition, bit for bit."""

import numpy as np
import pytest

from deploy.formats.packed import encode
from deploy.formats.safetensors_file import BFloat16, to_bfloat16
from deploy.kernels.cpu.library import Matrix, Runtime, SourceWeights
from deploy.kernels.reference.linear import Int8Linear


def source_of(weight, dtype="BF16", *, symmetric=False, bias=None, row_ids=None):
    """A GroupedInt as a file would hold it."""
    tensors = encode("w", weight, dtype, symmetric=symmetric)

    def raw(name):
        value = tensors.get(f"w.{name}")
        return value.bits if isinstance(value, BFloat16) else value

    minimum = raw("weight_min") if weight.zero_point is None else raw("weight_zero_point")
    return SourceWeights(
        weight.shape, raw("weight_packed"), dtype, raw("weight_scale"), minimum, weight.bits, weight.group_size,
        weight.zero_point is None, bias, row_ids,
    )  # fmt: skip


def inputs(rng, rows, num_in):
    """Rows of very different sizes, with a zero group, a subnormal one, and a tie in rounding."""
    x = rng.standard_normal((rows, num_in)).astype(np.float32) * np.float32(10) ** rng.integers(-6, 6, (rows, 1))
    x = x.astype(np.float32)
    x[0, :32] = 0
    x[-1, -32:] = np.float32(1e-40)
    x[rows // 2, :32] = 0.5
    x[rows // 2, 3] = 127
    return x


@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "minimum"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("num_out", "num_in", "group_size"), [(17, 96, 32), (64, 192, 64), (33, 384, 128), (1, 32, 32)]
)
def test_a_packed_layer_is_the_definition(runtime, tiny, num_out, num_in, group_size, bits, form):
    rng = np.random.default_rng(num_out + bits)
    weight = tiny.grouped(rng, num_out, num_in, tiny.Quantized(bits, group_size, form))
    dtype = "F16" if form == "minimum" else "BF16"
    matrix = Matrix(runtime, source_of(weight, dtype, symmetric=form == "symmetric"))
    expected = Int8Linear.from_grouped(weight)
    for rows in (1, 2, 5, 6, 7, 13, 33):
        x = inputs(rng, rows, num_in)
        np.testing.assert_array_equal(matrix.multiply(x), expected(x))


def test_every_number_of_rows_gives_the_same_row(runtime, tiny):
    rng = np.random.default_rng(3)
    matrix = Matrix(runtime, source_of(tiny.grouped(rng, 50, 160, tiny.Quantized())))
    x = inputs(rng, 33, 160)
    alone = np.concatenate([matrix.multiply(x[i : i + 1]) for i in range(33)])
    for rows in range(1, 34):
        np.testing.assert_array_equal(matrix.multiply(x[:rows]), alone[:rows])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_scales_may_come_in_every_type(runtime, tiny, dtype):
    rng = np.random.default_rng(4)
    weight = tiny.grouped(rng, 40, 64, tiny.Quantized(4, 32, "asymmetric"))
    x = inputs(rng, 3, 64)
    matrix = Matrix(runtime, source_of(weight, dtype))
    np.testing.assert_array_equal(matrix.multiply(x), Int8Linear.from_grouped(weight)(x))


def test_products_of_scales_in_32_bits_and_zero_points_are_rounded_once(runtime, tiny):
    rng = np.random.default_rng(5)
    q = rng.integers(0, 256, (40, 64), dtype=np.uint8)
    zeros = rng.integers(0, 256, (40, 2), dtype=np.uint8)
    scale = rng.uniform(0.1, 1, (40, 2)).astype(np.float32)
    weight = type(tiny.grouped(rng, 1, 32, tiny.Quantized())).from_zero_point(q, scale, zeros, bits=8, group_size=32)
    x = inputs(rng, 7, 64)
    np.testing.assert_array_equal(
        Matrix(runtime, source_of(weight, "F32")).multiply(x), Int8Linear.from_grouped(weight)(x)
    )


def test_the_largest_codes_do_not_saturate(runtime, tiny):
    """Every product at its limit: where 16-bit sums would overflow."""
    for bits in (4, 8):
        for code in (0, (1 << bits) - 1):
            q = np.full((32, 64), code, dtype=np.uint8)
            ones = np.ones((32, 2), dtype=np.float32)
            kind = type(tiny.grouped(np.random.default_rng(0), 1, 32, tiny.Quantized()))
            weight = kind.from_zero_point(q, ones, 1, bits=bits, group_size=32)
            x = np.concatenate([np.ones((1, 64)), -np.ones((1, 64))]).astype(np.float32)
            np.testing.assert_array_equal(
                Matrix(runtime, source_of(weight, "F32")).multiply(x), Int8Linear.from_grouped(weight)(x)
            )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("num_out", "num_in"), [(70, 96), (31, 2080)])
def test_a_plain_layer_is_quantized_as_the_definition_says(runtime, dtype, num_out, num_in):
    rng = np.random.default_rng(6)
    values = rng.standard_normal((num_out, num_in)).astype(np.float32)
    values[3, :32], values[4, 32:64] = 0, 1e-38
    raw = {"F32": values, "F16": values.astype(np.float16), "BF16": to_bfloat16(values)}[dtype]
    exact = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)
    bias = rng.standard_normal(num_out).astype(np.float32)
    x = inputs(rng, 9, num_in)
    matrix = Matrix(runtime, SourceWeights((num_out, num_in), raw, dtype, bias=bias))
    np.testing.assert_array_equal(matrix.multiply(x), Int8Linear.from_float(exact, bias)(x))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("num_out", "num_in"), [(70, 96), (31, 2080)])
def test_a_plain_layer_in_4_bits_is_quantized_as_the_definition_says(runtime, dtype, num_out, num_in):
    rng = np.random.default_rng(7)
    values = rng.standard_normal((num_out, num_in)).astype(np.float32)
    values[3, :32], values[4, 32:64], values[5, :32], values[6, :32] = 0, 1e-38, 0.75, np.linspace(0, 3e-8, 32)
    values[7, 64:96], values[8, 0] = rng.standard_normal(32) * 1e-5, 60000
    raw = {"F32": values, "BF16": to_bfloat16(values)}[dtype]
    exact = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values
    bias = rng.standard_normal(num_out).astype(np.float32)
    matrix = Matrix(runtime, SourceWeights((num_out, num_in), raw, dtype, bits=4, bias=bias))
    x = inputs(rng, 9, num_in)
    np.testing.assert_array_equal(matrix.multiply(x), Int8Linear.from_float4(exact, bias)(x))


def test_a_plain_layer_in_4_bits_beyond_what_its_scales_hold_is_refused(runtime):
    values = np.zeros((32, 32), np.float32)
    values[1, 5] = 2.0**21
    with pytest.raises(ValueError, match="scale, minimum or weight that is not finite"):
        Matrix(runtime, SourceWeights((32, 32), values, "F32", bits=4))


def test_chosen_rows_are_rows_of_the_whole(runtime, tiny):
    rng = np.random.default_rng(8)
    chosen = np.sort(rng.choice(90, 37, replace=False)).astype(np.int64)
    x = inputs(rng, 6, 64)
    values = rng.standard_normal((90, 64)).astype(np.float32)
    some = Matrix(runtime, SourceWeights((90, 64), values, "F32", row_ids=chosen))
    np.testing.assert_array_equal(some.multiply(x), Int8Linear.from_float(values)(x)[:, chosen])
    weight = tiny.grouped(rng, 90, 64, tiny.Quantized())
    some = Matrix(runtime, source_of(weight, row_ids=chosen))
    np.testing.assert_array_equal(some.multiply(x), Int8Linear.from_grouped(weight)(x)[:, chosen])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(runtime, tiny, threads):
    rng = np.random.default_rng(9)
    source = source_of(tiny.grouped(rng, 330, 96, tiny.Quantized()))
    x = inputs(rng, 8, 96)
    other = Matrix(Runtime(threads=threads, isa=runtime.isa), source)
    np.testing.assert_array_equal(other.multiply(x), Matrix(runtime, source).multiply(x))


def test_what_does_not_fit_is_refused(runtime):
    values = np.zeros((4, 48), dtype=np.float32)
    with pytest.raises(ValueError, match="multiple of 32"):
        Matrix(runtime, SourceWeights((4, 48), values, "F32"))
    with pytest.raises(ValueError, match="not finite"):
        Matrix(runtime, SourceWeights((4, 32), np.full((4, 32), np.inf, dtype=np.float32), "F32"))
    codes, scale = np.zeros((4, 32), dtype=np.int32), np.ones((4, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="group_size=256"):
        Matrix(runtime, SourceWeights((4, 256), codes, "F32", scale, None, 4, 256))
    with pytest.raises(ValueError, match="bits=3"):
        Matrix(runtime, SourceWeights((4, 32), codes, "F32", scale, None, 3, 32))
    scale[2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        Matrix(runtime, SourceWeights((4, 32), codes, "F32", scale, None, 4, 32))
