import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers import AutoModelForCausalLM

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.components import describe_precision, used_extensions
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import decode, encode
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors

TENSOR4, TENSOR8, TOKEN8 = ActivationGrid(4, "tensor"), ActivationGrid(8, "tensor"), ActivationGrid(8, "token")
NORM = "model.layers.0.self_attn.q_proj"


def columns(*copies):
    """flatten of channels that have so many copies, then one each up to 32 columns."""
    rest = np.ones(32 - sum(copies), dtype=np.int64)
    counts = np.concatenate([np.array(copies, dtype=np.int64), rest])
    return np.repeat(np.arange(counts.size), counts).astype(np.int32)


def rewrite(directory, change):
    path = directory / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {}
    for name in file.names():
        array = file.array(name).copy()
        tensors[name] = BFloat16(array) if file.dtype(name) == "BF16" else array
    change(tensors)
    write_safetensors(path, tensors)


def test_copies_of_a_channel_are_counted():
    inputs = LayerInputs(TENSOR4, 0.5, columns(1, 3, 2))
    assert inputs.copies().tolist()[:8] == [0, 0, 1, 2, 0, 1, 0, 0]
    assert inputs.num_channels == 29


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((TENSOR4,), "do not fit"),
        ((TOKEN8, 0.5), "do not fit"),
        ((TENSOR4, 0.0), "positive"),
        ((TENSOR4, -1.0), "positive"),
        ((TENSOR4, float("nan")), "positive"),
        ((TENSOR4, 1e-40), "positive"),
        ((TENSOR4, 0.1), "float32"),
        ((TOKEN8, None, columns()), "scope 'tensor'"),
        ((TENSOR4, 0.5, columns()[:31]), "a multiple of 32"),
        ((TENSOR4, 0.5, columns().astype(np.int64)), "int32"),
        ((TENSOR4, 0.5, columns()[::-1].copy()), "every channel"),
        ((TENSOR4, 0.5, columns() + np.int32(1)), "every channel"),
        ((TENSOR4, 0.5, columns() * np.int32(2)), "every channel"),
        ((TENSOR4, 0.5, np.zeros(0, np.int32)), "every channel"),
    ],
)
def test_inputs_that_have_no_meaning_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        LayerInputs(*arguments)


@pytest.mark.parametrize(("bits", "scope"), [(6, "tensor"), (8, "group")])
def test_other_grids_are_refused(bits, scope):
    with pytest.raises(ValueError, match="not supported"):
        ActivationGrid(bits, scope)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric", "minimum"])
@pytest.mark.parametrize(("bits", "group_size", "grid"), [(8, None, TOKEN8), (8, 32, TENSOR8), (4, None, TENSOR4)])
def test_encode_then_decode_is_the_identity(tmp_path, tiny, form, bits, group_size, grid):
    rng = np.random.default_rng(3)
    kind = tiny.Quantized(bits, group_size, form, grid)
    weight = tiny.grouped(rng, 11, 192, kind)
    inputs = tiny.inputs(rng, 192, kind)
    dtype = "F16" if form == "minimum" else "BF16"
    write_safetensors(tmp_path / "m", encode("L", weight, dtype, symmetric=form == "symmetric", inputs=inputs))
    file = SafetensorsFile(tmp_path / "m")
    assert ("L.weight_packed" in file) == (bits == 4)
    back = decode(file, "L", group_size, bits, is_packed=bits == 4)
    for name in ("q", "scale", "minimum"):
        assert np.array_equal(getattr(back, name), getattr(weight, name))
    assert form == "minimum" or np.array_equal(back.zero_point, weight.zero_point)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
def test_compressed_tensors_dequantizes_our_8_bit_layers_to_our_numbers(tiny, form):
    kind = tiny.Quantized(8, None, form, TOKEN8)
    weight = tiny.grouped(np.random.default_rng(1), 17, 96, kind)
    tensors = encode("L", weight, "F32", symmetric=form == "symmetric", inputs=LayerInputs(TOKEN8))
    args = QuantizationArgs(num_bits=8, symmetric=form == "symmetric", strategy="channel")
    theirs = IntQuantizationCompressor.decompress(
        {name.removeprefix("L."): torch.from_numpy(value) for name, value in tensors.items()},
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    assert np.array_equal(theirs["weight"].numpy(), weight.dequantize())


def test_flattened_inputs_must_be_as_wide_as_the_weight(tiny):
    weight = tiny.grouped(np.random.default_rng(1), 3, 64, tiny.Quantized(4, 32))
    with pytest.raises(ValueError, match=r"L: flatten has 32 columns, the weight 64"):
        encode("L", weight, "F32", inputs=LayerInputs(TENSOR4, 0.5, columns()))


def test_a_model_of_all_kinds_is_read(tmp_path, tiny):
    with ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config(), tiny.MIXED)) as model:
        flattened = model.inputs(NORM)
        assert (flattened.grid, flattened.num_channels) == (TENSOR4, 96)
        assert model.linear(NORM).shape == (96, flattened.flatten.size)
        assert model.inputs("model.layers.0.self_attn.k_proj").equals(flattened)
        assert model.inputs("model.layers.0.self_attn.o_proj").scale is None
        assert model.inputs("model.layers.1.mlp.up_proj") is None
        assert model.inputs("model.layers.1.mlp.down_proj").flatten.size == 192
        assert "4-bit, a scale per output, symmetric, inputs 4-bit per tensor, flattened" in describe_precision(model)
        for name in model.layers:
            model.linear(name)
            model.release(name)
    assert used_extensions(tmp_path, "m") == {"weight_min", "input_flatten"}


def put(name, value):
    return lambda tensors: tensors.update({f"{NORM}.{name}": value})


def put_in_all(name, change):
    def apply(tensors):
        for layer in "qkv":
            key = f"model.layers.0.self_attn.{layer}_proj.{name}"
            tensors[key] = change(tensors[key])

    return apply


def misplace(flatten):
    flatten[40] = 1
    return flatten


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(f"{NORM}.input_scale"), "input_scale' is missing"),
        (lambda tensors: tensors.pop(f"{NORM}.input_flatten"), "input_flatten' is missing"),
        (put("input_scale", np.array([0.0], np.float32)), "one positive number"),
        (put("input_scale", np.array([-0.5], np.float32)), "one positive number"),
        (put("input_scale", np.array([np.nan], np.float32)), "one positive number"),
        (put("input_scale", np.array([np.inf], np.float32)), "one positive number"),
        (put("input_scale", np.ones(2, np.float32)), "one positive number"),
        (put("input_scale", np.ones((), np.float32)), r"expected F32 \[1\]"),
        (put("input_scale", np.ones(1, np.float16)), r"expected F32 \[1\]"),
        (put("input_scale", np.array([0.25], np.float32)), "q_proj' and .*k_proj' read the same rows"),
        (put("input_flatten", np.zeros((32, 1), np.int32)), r"expected I32 \[columns\]"),
        (put("input_flatten", np.arange(96, dtype=np.int64)), "I64"),
        (put("input_flatten", np.arange(96, dtype=np.int32)), r"weight_packed' is I32.*expected I32 \[96, 12\]"),
        (put("input_flatten", np.arange(128, dtype=np.int32)), "names 128 channels, expected 96"),
        (put_in_all("input_flatten", misplace), "every channel in order"),
        (put_in_all("input_flatten", lambda flatten: np.minimum(flatten, np.int32(94))), "names 95 channels"),
        (put("weight_shape", np.array([96, 96])), "weight_shape' says"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.input_scale": np.ones(1, np.float32)}),
            "does not belong",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.weight": np.ones((96, 96), np.int16)}),
            "expected I8",
        ),
    ],
)
def test_inputs_that_are_not_as_documented_are_refused_by_file_and_name(tmp_path, tiny, change, reason):
    directory = tiny.model(tmp_path / "m", tiny.config(), tiny.MIXED)
    rewrite(directory, change)
    with pytest.raises(FormatError, match=reason) as caught:
        ModelDirectory.open(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("other", [None, "asymmetric"])
def test_layers_that_read_the_same_rows_must_agree(tmp_path, tiny, other):
    kinds = {"up_proj": other and tiny.Quantized(), "gate_proj": tiny.Quantized(8, None, "symmetric", TOKEN8)}
    with pytest.raises(FormatError, match=r"gate_proj' and .*up_proj' read the same rows"):
        ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config(), kinds))


@pytest.mark.parametrize(("bits", "grid"), [(8, TOKEN8), (8, TENSOR8), (4, TOKEN8)])
def test_transformers_loads_what_has_no_extension(tmp_path, tiny, bits, grid):
    directory = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized(bits, None, "symmetric", grid))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs(torch.tensor([[1, 2]]))  # quantized weights are decompressed by the first forward
    weight = theirs.get_submodule("model.layers.1.mlp.down_proj").weight.detach().float().numpy()
    expected = ModelDirectory.open(directory).linear("model.layers.1.mlp.down_proj").dequantize()
    # They multiply in bfloat16, the scale's dtype: equal up to that rounding.
    assert abs(weight - expected).max() <= 2.0**-8 * abs(expected).max()
