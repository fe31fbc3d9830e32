"""The one table of supported model architectures: llama, qwen2, qwen3, mistral.

All four are the same network (RMSNorm → attention with rotary positions → RMSNorm → SiLU-gated MLP, residual) and
differ in two switches: biases on q/k/v (qwen2) and RMSNorm on each head's q and k (qwen3). Tensor names are Hugging
Face's. What would change the numbers and is not implemented is refused, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from deploy.formats.errors import FormatError


@dataclass(frozen=True)
class Architecture:
    """What distinguishes a model type, and the class that transformers uses for it."""

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM"),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture("Qwen3ForCausalLM", qk_norm=True),
    "mistral": Architecture("MistralForCausalLM"),
}


# Beyond any model; a damaged or hostile config.json must not make lists of its size.
MAX_LAYERS = 4096
MAX_SIZE = (1 << 31) - 1


class LinearLayer(NamedTuple):
    """A linear layer: its name without `.weight`, and its weight's shape."""

    name: str
    num_out: int
    num_in: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Parameters of rope type "llama3" (transformers, `modeling_rope_utils.py`); lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


def _refuse(key: str, value: object, supported: str) -> FormatError:
    return FormatError(f"config.json: {key}={value!r} is not supported; supported: {supported}")


def _count(config: Mapping[str, Any], key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise _refuse(key, value, f"an integer from 1 to {limit}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    # Beyond the largest double there are integers, too.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _refuse(key, value, "a positive number")
    return float(value)


def _parse_rope(config: Mapping[str, Any], context_length: int) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise _refuse("rope_parameters", parameters, "an object")
    theta = _number({"rope_theta": parameters.get("rope_theta", config.get("rope_theta"))}, "rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise _refuse("rope_type", kind, "default, llama3")
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise _refuse("partial_rotary_factor", parameters.get("partial_rotary_factor"), "1.0")
    if kind == "default":
        return theta, None
    scaling = Llama3Scaling(
        factor=_number(parameters, "factor"),
        low_freq_factor=_number(parameters, "low_freq_factor"),
        high_freq_factor=_number(parameters, "high_freq_factor"),
        original_context_length=_count(parameters, "original_max_position_embeddings", context_length),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise _refuse("high_freq_factor", scaling.high_freq_factor, "a number above low_freq_factor")
    return theta, scaling


def _parse_window(config: Mapping[str, Any], model_type: str) -> int | None:
    """Length of the sliding attention window that some layer has, or None."""
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise _refuse("layer_types", layer_types, "a list")
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise _refuse("layer_types", kind, "full_attention")
    if model_type in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        return None
    if model_type == "llama" or config.get("sliding_window") is None:
        return None
    return _count(config, "sliding_window")


def _check_switches(config: Mapping[str, Any], model_type: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _refuse("hidden_act", activation, "silu")
    if config.get("mlp_bias"):
        raise _refuse("mlp_bias", True, "false")
    if config.get("attention_bias") and model_type != "qwen2":
        raise _refuse("attention_bias", True, f"false for model_type {model_type!r}")


@dataclass(frozen=True)
class ModelShape:
    """Everything about a model but its weights.

    context_length is capped at sliding_window where the model has one: up to that length windowed and full attention
    are the same, and only full attention is implemented.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    context_length: int
    sliding_window: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json. Raises FormatError naming what is unsupported and what is supported."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise _refuse("model_type", model_type, ", ".join(ARCHITECTURES))
        architecture = ARCHITECTURES[model_type]
        _check_switches(config, model_type)
        num_heads = _count(config, "num_attention_heads")
        hidden_size = _count(config, "hidden_size")
        num_kv_heads = _count(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise _refuse("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
        head_dim = _count(config, "head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads)
        if head_dim % 2:
            raise _refuse("head_dim", head_dim, "an even number")
        trained_length = _count(config, "max_position_embeddings")
        window = _parse_window(config, model_type)
        theta, scaling = _parse_rope(config, trained_length)
        return cls(
            model_type=model_type,
            num_layers=_count(config, "num_hidden_layers", limit=MAX_LAYERS),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_count(config, "intermediate_size"),
            vocab_size=_count(config, "vocab_size"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=architecture.qkv_bias,
            qk_norm=architecture.qk_norm,
            context_length=min(trained_length, window or trained_length),
            sliding_window=window,
        )


def linear_layers(shape: ModelShape) -> list[LinearLayer]:
    """The layers that quantization applies to, in forward order; lm_head is not among them."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    num_q, num_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layers = []
    for index in range(shape.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        layers += [
            LinearLayer(f"{attention}.q_proj", num_q, hidden),
            LinearLayer(f"{attention}.k_proj", num_kv, hidden),
            LinearLayer(f"{attention}.v_proj", num_kv, hidden),
            LinearLayer(f"{attention}.o_proj", hidden, num_q),
            LinearLayer(f"{mlp}.gate_proj", inner, hidden),
            LinearLayer(f"{mlp}.up_proj", inner, hidden),
            LinearLayer(f"{mlp}.down_proj", hidden, inner),
        ]
    return layers


def shared_inputs(shape: ModelShape) -> list[tuple[str, ...]]:
    """Names of linear layers that read the same rows, in forward order."""
    groups: list[tuple[str, ...]] = []
    for index in range(shape.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        groups.append((f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"))
        groups.append((f"{mlp}.gate_proj", f"{mlp}.up_proj"))
    return groups


def other_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not a linear layer's weight: full name → shape, in forward order."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    num_q, num_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = (shape.hidden_size,)
        if shape.qkv_bias:
            tensors[f"{layer}.self_attn.q_proj.bias"] = (num_q,)
            tensors[f"{layer}.self_attn.k_proj.bias"] = (num_kv,)
            tensors[f"{layer}.self_attn.v_proj.bias"] = (num_kv,)
        if shape.qk_norm:
            tensors[f"{layer}.self_attn.q_norm.weight"] = (shape.head_dim,)
            tensors[f"{layer}.self_attn.k_norm.weight"] = (shape.head_dim,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (shape.hidden_size,)
    tensors["model.norm.weight"] = (shape.hidden_size,)
    if not shape.tied_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return tensors
