import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.formats.codes import pack_codes, unpack_codes
from deploy.formats.errors import FormatError
from deploy.formats.packed import GroupedInt, decode, encode
from deploy.formats.safetensors_file import SafetensorsFile, from_bfloat16, to_bfloat16, write_safetensors


def scheme(bits, group_size, symmetric):
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=args)


def to_torch(tensors):
    return {
        name.removeprefix("L."): torch.from_numpy(value)
        if isinstance(value, np.ndarray)
        else torch.from_numpy(value.bits).view(torch.bfloat16)
        for name, value in tensors.items()
    }


def saved(tmp_path, tensors):
    write_safetensors(tmp_path / "layer.safetensors", tensors)
    return SafetensorsFile(tmp_path / "layer.safetensors")


def test_the_published_example_packs_low_nibble_first():
    codes = (np.array([[-8, -7, -6, -5, 0, 1, 2, 7]]) + 8).astype(np.uint8)
    assert pack_codes(codes, 4).view(np.uint32)[0, 0] == 0xFA983210


@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_equals_compressed_tensors_and_unpacks_to_itself(bits, rows, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    signed = torch.from_numpy((codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))
    words = pack_codes(codes, bits)
    # Beyond the last code compressed-tensors leaves zero bits, as here.
    assert np.array_equal(words, pack_to_int32(signed, bits).numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), bits, torch.Size((rows, count))), signed)
    assert np.array_equal(unpack_codes(words, bits, count), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "count", "group_size"), [(17, 96, 32), (8, 128, 64), (5, 384, 128), (1, 32, 32)])
def test_compressed_tensors_dequantizes_our_encoding_to_our_numbers(tiny, bits, form, rows, count, group_size):
    rng = np.random.default_rng(rows)
    weight = tiny.grouped(rng, rows, count, tiny.Quantized(bits, group_size, form))
    is_symmetric = form == "symmetric"
    tensors = to_torch(encode("L", weight, "F32", symmetric=is_symmetric))
    assert ("weight_zero_point" in tensors) == (not is_symmetric)
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme(bits, group_size, is_symmetric))
    assert np.array_equal(theirs["weight"].numpy(), weight.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
def test_what_compressed_tensors_compresses_decodes_to_its_numbers(tmp_path, bits, form):
    torch.manual_seed(bits)
    rows, count, group_size, is_symmetric = 13, 160, 32, form == "symmetric"
    limit = 1 << (bits - 1)
    state = {
        "weight": torch.randn(rows, count),
        "weight_scale": torch.rand(rows, count // group_size) * 2 / limit + 0.01,
        "weight_zero_point": torch.randint(-limit, limit, (rows, count // group_size), dtype=torch.int8),
    }
    if is_symmetric:
        state["weight_zero_point"].zero_()
    kind = scheme(bits, group_size, is_symmetric)
    compressed = PackedQuantizationCompressor.compress(state, kind)
    file = saved(tmp_path, {f"L.{name}": value.contiguous().numpy() for name, value in compressed.items()})
    theirs = PackedQuantizationCompressor.decompress(compressed, kind)["weight"].numpy()
    assert np.array_equal(decode(file, "L", group_size, bits).dequantize(), theirs)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric", "minimum"])
@pytest.mark.parametrize("bits", [4, 8])
def test_encode_then_decode_is_the_identity(tmp_path, tiny, form, bits):
    weight = tiny.grouped(np.random.default_rng(4), 11, 192, tiny.Quantized(bits, 64, form))
    dtype = "F16" if form == "minimum" else "BF16"
    file = saved(tmp_path, encode("L", weight, dtype, symmetric=form == "symmetric"))
    back = decode(file, "L", 64, bits)
    for name in ("q", "scale", "minimum"):
        assert np.array_equal(getattr(back, name), getattr(weight, name))
    assert (back.zero_point is None) == (form == "minimum")
    assert form == "minimum" or np.array_equal(back.zero_point, weight.zero_point)


def test_a_gguf_grid_dequantizes_to_the_gguf_packages_own_numbers():
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(8)
    raw = quants.quantize(rng.standard_normal((6, 96)).astype(np.float32), GGMLQuantizationType.Q4_1)
    blocks = raw.reshape(6, 3, 20)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
    q = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=2).reshape(6, 96)
    ours = GroupedInt(q, scale, minimum, 4, 32).dequantize()
    assert np.array_equal(ours, quants.dequantize(raw, GGMLQuantizationType.Q4_1))


def test_the_minimum_of_integer_zero_points_is_exact_for_16_bit_scales():
    scale = from_bfloat16(to_bfloat16(np.random.default_rng(0).uniform(0, 1, (9, 2)).astype(np.float32)))
    zeros = np.arange(18, dtype=np.uint8).reshape(9, 2) * 14
    weight = GroupedInt.from_zero_point(np.zeros((9, 64), np.uint8), scale, zeros, bits=8, group_size=32)
    assert np.array_equal(weight.minimum.astype(np.float64), -zeros.astype(np.float64) * scale.astype(np.float64))


def test_scales_that_would_change_in_the_file_are_refused():
    weight = GroupedInt.from_zero_point(
        np.zeros((2, 32), np.uint8), np.full((2, 1), 0.1, np.float32), 8, bits=4, group_size=32
    )
    with pytest.raises(ValueError, match=r"L\.weight_scale.*BF16"):
        encode("L", weight, "BF16")


def test_a_symmetric_encoding_of_other_zero_points_is_refused():
    weight = GroupedInt.from_zero_point(
        np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float32), 7, bits=4, group_size=32
    )
    with pytest.raises(ValueError, match="zero point to be 8"):
        encode("L", weight, "BF16", symmetric=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group_size": 40}, "group_size=40"),
        ({"q": np.full((2, 64), 16, np.uint8)}, "holds 16"),
        ({"scale": np.ones((2, 3), np.float32)}, "scale must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, reason):
    parts = {"q": np.zeros((2, 64), np.uint8), "bits": 4, "group_size": 32}
    parts |= {"scale": np.ones((2, 2), np.float32), "minimum": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=reason):
        GroupedInt(**(parts | change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"L.weight_scale": None}, "weight_scale' is missing"),
        ({"L.weight_shape": np.array([9, 64])}, "weight_packed"),
        ({"L.weight_packed": np.zeros((3, 8), np.int64)}, "expected I32"),
        ({"L.weight_zero_point": np.zeros((2, 2), np.int32)}, "weight_zero_point"),
        ({"L.weight_min": np.zeros((3, 2), np.float16)}, "both"),
        ({"L.weight_scale": np.full((3, 2), np.nan, np.float32)}, "not finite"),
    ],
)
def test_a_layer_that_is_not_stored_as_documented_is_refused(tmp_path, tiny, change, reason):
    weight = tiny.grouped(np.random.default_rng(4), 3, 64, tiny.Quantized())
    tensors = encode("L", weight, "F32") | change
    file = saved(tmp_path, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(FormatError, match=reason):
        decode(file, "L", 32, 4)
