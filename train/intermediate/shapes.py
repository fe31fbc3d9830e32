"""What an intermediate model looks like, before anything is loaded: config.json and shape, from those of its source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploy.formats.architectures import ModelShape

_SHARED = (
    *("vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys of config.json that a model of other sizes has in common with the target."""
_PER_LAYER = ("layer_types", "max_window_layers")
"""Keys of config.json that list or count a model's own layers."""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama that starts from noise. ties_embeddings: lm_head is the embedding. projects_embedding: the target's,
    on its first singular directions; otherwise noise."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ties_embeddings: bool
    projects_embedding: bool


def choose_layers(num_layers: int, chosen: Sequence[int] | None, num_kept: int | None) -> tuple[int, ...]:
    """Which of `num_layers` layers are kept, ascending: those chosen (negative ones count from the end), or the first
    `num_kept`.

    Raises ValueError where they do not exist, and unless exactly one of both is given.
    """
    if (chosen is None) == (num_kept is None):
        raise ValueError(f"layers={chosen} with num_layers={num_kept}: give one of the two, and set the other to null")
    if num_kept is not None:
        if not 1 <= num_kept <= num_layers:
            raise ValueError(f"num_layers={num_kept} must lie between 1 and {num_layers}, which the model has")
        return tuple(range(num_kept))
    assert chosen is not None
    layers = [layer if layer >= 0 else num_layers + layer for layer in chosen]
    is_valid = bool(layers) and all(0 <= layer < num_layers for layer in layers)
    if not is_valid or len(set(layers)) < len(layers):
        raise ValueError(f"layers={list(chosen)} must name different ones of 0 to {num_layers - 1} (-1 is the last)")
    return tuple(sorted(layers))


def layers_shape(source: ModelShape, num_layers: int, vocab_size: int, *, unties: bool = False) -> ModelShape:
    """Of a model with `num_layers` of the source's layers, for a vocabulary of `vocab_size`.

    unties: lm_head is its own, also where the source's is its embedding.
    """
    ties = source.tied_embeddings and not unties
    return replace(source, num_layers=num_layers, vocab_size=vocab_size, tied_embeddings=ties)


def layers_config(source: dict[str, Any], num_layers: int, vocab_size: int, *, unties: bool = False) -> dict[str, Any]:
    """config.json of the same."""
    kept = {key: value for key, value in source.items() if key not in _PER_LAYER}
    ties = {"tie_word_embeddings": False} if unties else {}
    return {**kept, **ties, "num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": "float32"}


def random_shape(target: ModelShape, sizes: Sizes) -> ModelShape:
    """Of a Llama with the target's vocabulary, context, rotary base and norm."""
    return replace(
        target,
        model_type="llama",
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        tied_embeddings=sizes.ties_embeddings,
        qkv_bias=False,
        qk_norm=False,
        sliding_window=None,
    )


def random_config(target: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """config.json of the same."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: target[key] for key in _SHARED if target.get(key) is not None},
        "max_position_embeddings": ModelShape.from_config(target).context_length,
        "num_hidden_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "tie_word_embeddings": sizes.ties_embeddings,
        "hidden_act": "silu",
        "dtype": "float32",
    }
