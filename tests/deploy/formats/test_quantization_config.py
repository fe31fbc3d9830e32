import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.quantization_config import QuantizationGroup, parse_quantization_config, quantization_config

FOUR = QuantizationGroup((r"re:.*self_attn\..*",), 4, 32, symmetric=False)
EIGHT = QuantizationGroup(("Linear",), 8, 64, symmetric=True)


def test_what_is_written_is_read_back():
    parsed = parse_quantization_config(quantization_config([FOUR, EIGHT]))
    assert parsed.groups == (FOUR, EIGHT)
    assert parsed.ignore == ("lm_head",)


def test_compressed_tensors_accepts_it():
    config = QuantizationConfig.model_validate(quantization_config([FOUR, EIGHT]))
    assert config.config_groups["group_0"].weights.num_bits == 4
    assert config.config_groups["group_1"].weights.symmetric


def test_compressed_tensors_refuses_float_minima_instead_of_ignoring_them():
    group = QuantizationGroup(("Linear",), 4, 32, symmetric=False, float_minimum=True)
    with pytest.raises(ValueError, match="minimum"):
        QuantizationConfig.model_validate(quantization_config([group]))


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
    keys = path.replace("group.", "config_groups.group_0.", 1).split(".")
    holder = config
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
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
