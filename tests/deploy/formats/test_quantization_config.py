from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from transformers import AutoModelForCausalLM

from deploy.formats.activations import ActivationGrid
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.quantization_config import QuantizationGroup, parse_quantization_config, quantization_config

FOUR = QuantizationGroup((r"re:.*self_attn\..*",), 4, 32, symmetric=False)
EIGHT = QuantizationGroup(("Linear",), 8, 64, symmetric=True)
TOKEN, STATIC = ActivationGrid(8, "token"), ActivationGrid(4, "tensor")
W8A8 = QuantizationGroup(("Linear",), 8, None, symmetric=True, activations=TOKEN)
W4A4 = QuantizationGroup((r"re:.*mlp\..*",), 4, None, symmetric=False, activations=STATIC)
FLATTENED = QuantizationGroup(("Linear",), 4, 64, symmetric=True, activations=STATIC, flatten=True)


@pytest.mark.parametrize("groups", [(FOUR, EIGHT), (W8A8,), (FOUR, W4A4, W8A8), (W4A4, FLATTENED)])
def test_what_is_written_is_read_back(groups):
    parsed = parse_quantization_config(quantization_config(groups))
    assert parsed.groups == groups
    assert parsed.ignore == ("lm_head",)


def test_compressed_tensors_accepts_it():
    config = QuantizationConfig.model_validate(quantization_config([FOUR, EIGHT]))
    assert config.config_groups["group_0"].weights.num_bits == 4
    assert config.config_groups["group_1"].weights.symmetric


def test_compressed_tensors_accepts_quantized_inputs_and_several_forms():
    raw = quantization_config([W4A4, W8A8])
    config = QuantizationConfig.model_validate(raw)
    assert (raw["format"], config.config_groups["group_0"].format) == ("mixed-precision", "pack-quantized")
    assert config.config_groups["group_1"].format == "int-quantized"
    assert config.config_groups["group_0"].input_activations.strategy == "tensor"
    assert config.config_groups["group_1"].input_activations.dynamic
    assert config.config_groups["group_1"].weights.strategy == "channel"


def test_a_preset_of_compressed_tensors_is_read():
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    raw = QuantizationConfig(config_groups={"group_0": scheme}, format="int-quantized").model_dump(mode="json")
    assert parse_quantization_config(raw | {"quantization_status": "compressed"}).groups == (W8A8,)


@pytest.mark.parametrize(
    ("group", "key"),
    [
        (QuantizationGroup(("Linear",), 4, 32, symmetric=False, float_minimum=True), "minimum"),
        (FLATTENED, "flatten"),
    ],
)
def test_compressed_tensors_refuses_our_extensions_instead_of_ignoring_them(group, key):
    with pytest.raises(ValueError, match=key):
        QuantizationConfig.model_validate(quantization_config([group]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_size": None}, "needs activations"),
        ({"flatten": True}, "scope 'tensor'"),
        ({"flatten": True, "activations": TOKEN}, "scope 'tensor'"),
    ],
)
def test_a_group_that_has_no_meaning_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(EIGHT, **changes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "pack-quantized"),
        ("group.format", "pack-quantized"),
        ("group.weights.strategy", "tensor"),
        ("group.weights.group_size", 128),
        ("group.input_activations", "int8"),
        ("group.input_activations.num_bits", 6),
        ("group.input_activations.type", "float"),
        ("group.input_activations.symmetric", False),
        ("group.input_activations.strategy", "group"),
        ("group.input_activations.group_size", 32),
        ("group.input_activations.dynamic", "local"),
        ("group.input_activations.dynamic", False),
        ("group.input_activations.flatten", True),
    ],
)
def test_inputs_that_would_change_the_numbers_are_refused(path, value):
    config = quantization_config([W8A8])
    put(config, path, value)
    with pytest.raises(FormatError, match="quantization_config"):
        parse_quantization_config(config)


def put(config, path, value):
    *keys, last = path.replace("group.", "config_groups.group_0.", 1).split(".")
    holder = config
    for key in keys:
        holder = holder[key]
    holder[last] = value


def test_names_win_over_patterns_and_patterns_over_linear():
    exact = QuantizationGroup(("a.self_attn.q_proj",), 8, 32, symmetric=True)
    parsed = parse_quantization_config(quantization_config([EIGHT, FOUR, exact]))
    assert parsed.for_layer("a.self_attn.q_proj") == exact
    assert parsed.for_layer("a.self_attn.k_proj") == FOUR
    assert parsed.for_layer("a.mlp.up_proj") == EIGHT
    assert parsed.for_layer("lm_head") is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant_method", "gptq"),
        ("format", "int-quantized"),
        ("kv_cache_scheme", {}),
        ("quantization_status", "frozen"),
        ("sparsity_config", {"format": "sparse"}),
        ("transform_config", {"config_groups": {"a": 1}}),
        ("config_groups", {}),
        ("ignore", "lm_head"),
        ("ignore", ["re:("]),
        ("group.input_activations", {"num_bits": 8}),
        ("group.targets", []),
        ("group.weights.num_bits", 3),
        ("group.weights.num_bits", 4.0),
        ("group.weights.dynamic", []),
        ("group.weights.type", "float"),
        ("group.weights.strategy", "channel"),
        ("group.weights.group_size", None),
        ("group.weights.group_size", True),
        ("group.weights.dynamic", True),
        ("group.weights.actorder", "group"),
    ],
)
def test_what_would_change_the_numbers_is_refused(path, value):
    config = quantization_config([FOUR])
    put(config, path, value)
    with pytest.raises(FormatError, match="quantization_config"):
        parse_quantization_config(config)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_our_packed_model_with_our_weights(tmp_path, tiny, form, bits):
    directory = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized(bits, 32, form))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs(torch.tensor([[1, 2]]))  # packed weights are decompressed by the first forward
    ours = ModelDirectory.open(directory)
    weight = theirs.get_submodule("model.layers.1.mlp.down_proj").weight.detach().float().numpy()
    # They multiply in bfloat16, the scale's dtype: equal up to that rounding.
    expected = ours.linear("model.layers.1.mlp.down_proj").dequantize()
    assert abs(weight - expected).max() <= 2.0**-8 * abs(expected).max()
