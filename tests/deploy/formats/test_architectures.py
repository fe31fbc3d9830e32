import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from deploy.formats.architectures import Llama3Scaling, ModelShape, linear_layers, other_tensors

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_tensors_are_those_of_transformers(tiny, model_type, is_tied):
    config = tiny.config(model_type, tie_word_embeddings=is_tied)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[model_type](**config)).state_dict()
    shape = ModelShape.from_config(config)
    ours = {f"{layer.name}.weight": (layer.num_out, layer.num_in) for layer in linear_layers(shape)}
    ours |= other_tensors(shape)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    if is_tied:
        expected.pop("lm_head.weight", None)
    assert ours == expected


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_config_that_transformers_saved_is_understood(tiny, tmp_path, model_type):
    import json

    config = tiny.config(model_type)
    CONFIGS[model_type](**config).save_pretrained(tmp_path)
    assert ModelShape.from_config(json.loads((tmp_path / "config.json").read_text())) == ModelShape.from_config(
        config | ({"sliding_window": 4096} if model_type == "mistral" else {})
    )


def test_the_older_rope_keys_mean_the_same(tiny):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64, "rope_type": "llama3"}
    new = tiny.config(rope_parameters=scaling | {"rope_theta": 5e5})
    old = tiny.config(rope_scaling=scaling, rope_theta=5e5)
    del old["rope_parameters"]
    assert ModelShape.from_config(new) == ModelShape.from_config(old)
    assert ModelShape.from_config(old).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert ModelShape.from_config(old).rope_theta == 5e5


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 48}, 48),
        ("mistral", {"sliding_window": None}, 128),
        ("qwen2", {"sliding_window": 48, "use_sliding_window": False}, 128),
        ("qwen2", {"sliding_window": 48, "use_sliding_window": True}, 48),
        ("qwen3", {"sliding_window": 4096, "use_sliding_window": True}, 128),
    ],
)
def test_a_sliding_window_caps_the_context(tiny, model_type, changes, expected):
    assert ModelShape.from_config(tiny.config(model_type, **changes)).context_length == expected


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gemma3", {}, "model_type='gemma3'.*llama, qwen2, qwen3, mistral"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'.*default, llama3"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ("llama", {"hidden_size": "big"}, "hidden_size='big'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"num_hidden_layers": 2**70}, "num_hidden_layers=.*from 1 to 4096"),
        ("llama", {"vocab_size": 2**31}, "vocab_size"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tiny, model_type, changes, reason):
    with pytest.raises(ValueError, match=reason):
        ModelShape.from_config(tiny.config(model_type, **changes))


def test_a_missing_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type=None"):
        ModelShape.from_config({})
