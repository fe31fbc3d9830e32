"""config.json of an EAGLE-3 head in the form of vLLM's speculators library.

Keys and defaults as in speculators 0.3, `models/eagle3/config.py`; layer ids as in vLLM: layer i stands for the hidden
state that *enters* decoder layer i, num_layers for what enters the final norm. What is ours stands in one section,
`understudy`, which other programs ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from deploy.formats.architectures import ARCHITECTURES, MAX_SIZE, ModelShape
from deploy.formats.errors import FormatError

SPECULATORS_VERSION = "0.3.0"
ARCHITECTURE = "Eagle3Speculator"
# Where the target lies, seen from the head, in a bundle.
VERIFIER = "../target"
Embedding = Literal["reference", "copy"]


@dataclass(frozen=True)
class EagleConfig:
    """What decides a head's tensors.

    layer: shape of its one decoder layer; `vocab_size` is the target's. feature_layers: whose hidden states it reads.
    num_drafted: tokens that it was evaluated to draft in a row. target_type: the target's model type.
    embedding: "reference" leaves the target's own embedding out of the file, "copy" holds it.
    """

    layer: ModelShape
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    norm_before_residual: bool
    num_drafted: int
    target_type: str
    embedding: Embedding

    @classmethod
    def for_target(cls, target: ModelShape, **choices: Any) -> EagleConfig:
        """A head whose decoder layer is as wide as the target's. choices: the fields but layer and target_type.

        Raises FormatError for what does not fit the target.
        """
        layer = replace(
            target,
            model_type="llama",
            num_layers=1,
            tied_embeddings=False,
            qkv_bias=False,
            qk_norm=False,
            sliding_window=None,
        )
        config = cls(layer=layer, target_type=target.model_type, **choices)
        config.check_target(target)
        return config

    def check_target(self, target: ModelShape) -> None:
        """Raises FormatError naming the first value that a head for `target` cannot have."""
        if not 0 < self.draft_vocab_size <= target.vocab_size:
            raise FormatError(
                f"draft_vocab_size={self.draft_vocab_size} is not in 1 … {target.vocab_size}, the target's vocabulary"
            )
        for key in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(self.layer, key), getattr(target, key)
            if ours != theirs:
                raise FormatError(f"transformer_layer_config.{key}={ours}, but the target's is {theirs}")
        if self.layer.context_length < target.context_length:
            raise FormatError(
                f"the head's context of {self.layer.context_length} tokens is shorter than the target's of "
                f"{target.context_length}"
            )
        if self.target_type != target.model_type:
            raise FormatError(f"the head is for a {self.target_type} model, and the target is a {target.model_type}")
        layers = self.feature_layers
        is_ordered = all(low < high for low, high in pairwise(layers))
        if not layers or not is_ordered or layers[0] < 0 or layers[-1] > target.num_layers:
            raise FormatError(
                f"eagle_aux_hidden_state_layer_ids={list(layers)} must ascend and lie in 0 … {target.num_layers}"
            )

    def to_json(self) -> dict[str, Any]:
        """config.json's content."""
        return {
            "architectures": [ARCHITECTURE],
            "speculators_model_type": "eagle3",
            "speculators_version": SPECULATORS_VERSION,
            "dtype": "bfloat16",
            "draft_vocab_size": self.draft_vocab_size,
            "norm_before_residual": self.norm_before_residual,
            "target_hidden_size": self.layer.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(self.feature_layers),
            "embed_requires_grad": False,
            "transformer_layer_config": _layer_to_json(self.layer),
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.num_drafted}],
                "verifier": {
                    "name_or_path": VERIFIER,
                    "architectures": [ARCHITECTURES[self.target_type].class_name],
                },
            },
            "understudy": {"embedding": self.embedding},
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> EagleConfig:
        """Inverse of `to_json`. Raises FormatError naming the key that is missing, unknown or not as expected."""
        _check_keys(raw)
        layer = raw["transformer_layer_config"]
        if not isinstance(layer, Mapping):
            raise FormatError("transformer_layer_config is not an object")
        shape = ModelShape.from_config(layer)
        if shape.model_type != "llama" or shape.num_layers != 1:
            raise FormatError(
                f"transformer_layer_config is {shape.num_layers} layers of {shape.model_type!r}; supported: 1 of llama"
            )
        layer_ids = raw["eagle_aux_hidden_state_layer_ids"]
        if not isinstance(layer_ids, list) or not all(_is_count(value) for value in layer_ids):
            raise FormatError(f"eagle_aux_hidden_state_layer_ids={layer_ids!r} is not a list of layers")
        if raw["target_hidden_size"] != shape.hidden_size:
            raise FormatError(
                f"target_hidden_size={raw['target_hidden_size']!r} differs from the layer's hidden_size="
                f"{shape.hidden_size}; only heads as wide as their target are supported"
            )
        if not isinstance(raw["norm_before_residual"], bool):
            raise FormatError(f"norm_before_residual={raw['norm_before_residual']!r} is neither true nor false")
        if not _is_count(raw["draft_vocab_size"]):
            raise FormatError(f"draft_vocab_size={raw['draft_vocab_size']!r} is not a count")
        num_drafted, target_type = _parse_proposal(raw["speculators_config"])
        return cls(
            layer=shape,
            draft_vocab_size=raw["draft_vocab_size"],
            feature_layers=tuple(layer_ids),
            norm_before_residual=raw["norm_before_residual"],
            num_drafted=num_drafted,
            target_type=target_type,
            embedding=_parse_embedding(raw["understudy"]),
        )


def _layer_to_json(shape: ModelShape) -> dict[str, Any]:
    """The decoder layer as a LlamaConfig, rope in the form that every version of transformers reads."""
    scaling = shape.rope_scaling
    rope_scaling = None
    if scaling is not None:
        rope_scaling = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope_scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


_EXPECTED = {
    "architectures": [ARCHITECTURE],
    "speculators_model_type": "eagle3",
    "dtype": "bfloat16",
    "embed_requires_grad": False,
}
_KEYS = {
    *_EXPECTED,
    "speculators_version",
    "draft_vocab_size",
    "norm_before_residual",
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "transformer_layer_config",
    "speculators_config",
    "understudy",
}


def _check_keys(raw: Mapping[str, Any]) -> None:
    missing, unknown = sorted(_KEYS - set(raw)), sorted(set(raw) - _KEYS)
    if missing or unknown:
        raise FormatError(f"keys missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}")
    for key, expected in _EXPECTED.items():
        if raw[key] != expected:
            raise FormatError(f"{key}={raw[key]!r} is not supported; supported: {expected!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _parse_proposal(raw: Any) -> tuple[int, str]:
    """Tokens drafted in a row and the target's model type, from `speculators_config`."""
    try:
        (method,) = raw["proposal_methods"]
        (class_name,) = raw["verifier"]["architectures"]
        num_drafted = method["speculative_tokens"]
        if raw["algorithm"] != "eagle3" or method["proposal_type"] != "greedy" or not _is_count(num_drafted):
            raise ValueError
        (target_type,) = (kind for kind, known in ARCHITECTURES.items() if known.class_name == class_name)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"speculators_config={raw!r} is not a greedy eagle3 proposal for one of {', '.join(ARCHITECTURES)}"
        ) from error
    return num_drafted, target_type


def _parse_embedding(raw: object) -> Embedding:
    if not isinstance(raw, Mapping) or set(raw) != {"embedding"} or raw["embedding"] not in get_args(Embedding):
        raise FormatError(f"understudy={raw!r} is not {{'embedding': {' | '.join(get_args(Embedding))}}}")
    embedding: Embedding = raw["embedding"]
    return embedding
