"""Where an intermediate model starts: some layers of a model, a model as it is, or noise of a given shape.

Layers of a larger model are a better start than noise where training is short (layer dropping, arXiv 2204.09179): the
embedding, the head and what lies between already speak the target's language. A narrow model cannot take layers, but it
can take the embedding: projected onto its first singular directions, which keeps inner products best (Eckart-Young).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deploy.formats.architectures import ModelShape
from deploy.formats.model_dir import ModelDirectory

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
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


def spread_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """`num_kept` of `num_layers` layers at even distances, the first and the last among them.

    Raises ValueError when there are not that many.
    """
    if not 1 <= num_kept <= num_layers:
        raise ValueError(f"{num_kept} of {num_layers} layers cannot be kept")
    step = (num_layers - 1) / max(num_kept - 1, 1)
    return tuple(round(index * step) for index in range(num_kept))


def random_config(target: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """config.json of a Llama with the target's vocabulary, context, rotary base and norm."""
    limits = {"max_position_embeddings": ModelShape.from_config(target).context_length}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: target[key] for key in _SHARED if target.get(key) is not None},
        **limits,
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


def layers_config(source: dict[str, Any], num_layers: int, vocab_size: int) -> dict[str, Any]:
    """config.json of a model with `num_layers` of the source's layers, for a vocabulary of `vocab_size`."""
    kept = {key: value for key, value in source.items() if key not in _PER_LAYER}
    return {**kept, "num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": "float32"}


def from_layers(source: ModelDirectory, layers: Sequence[int], vocab_size: int) -> PreTrainedModel:
    """A model of the source's ends and these of its layers, in this order, in float32.

    vocab_size: of the target; rows of embedding and head beyond the source's, which no token of their common
    vocabulary has, are zero.
    """
    model = _empty(layers_config(source.config, len(layers), vocab_size))
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name in (EMBEDDING, HEAD):
                _copy_rows(_ends(source, name), tensor)
            else:
                tensor.copy_(_tensor(source, _source_name(name, layers)))
    model.tie_weights()
    return model


def from_noise(target: ModelDirectory, sizes: Sizes) -> PreTrainedModel:
    """A Llama of these sizes, initialised by transformers from torch's generator."""
    model = _empty(random_config(target.config, sizes))
    model.init_weights()
    if sizes.projects_embedding:
        projected = project(_tensor(target, EMBEDDING), sizes.hidden_size)
        with torch.no_grad():
            model.state_dict()[EMBEDDING].copy_(projected)
            if not sizes.ties_embeddings:
                head = projected if target.shape.tied_embeddings else project(_ends(target, HEAD), sizes.hidden_size)
                model.state_dict()[HEAD].copy_(head)
    return model


def project(matrix: Tensor, width: int) -> Tensor:
    """Rows of `matrix` [V, H] in their first `width` right singular directions, [V, width]; wider: zeros behind."""
    _values, directions = torch.linalg.eigh(matrix.double().t() @ matrix.double())
    found = (matrix.double() @ directions.flip(1)[:, :width]).float()
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))


def _empty(config: dict[str, Any]) -> PreTrainedModel:
    others = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    made = AutoConfig.for_model(config["model_type"], **others)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return model


def _source_name(name: str, layers: Sequence[int]) -> str:
    """The source's name of a tensor of a model that has only these of its layers."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return name
    return ".".join([*parts[:2], str(layers[int(parts[2])]), *parts[3:]])


def _ends(source: ModelDirectory, name: str) -> Tensor:
    return _tensor(source, EMBEDDING if source.shape.tied_embeddings else name)


def _tensor(source: ModelDirectory, name: str) -> Tensor:
    return torch.from_numpy(source.float32(name).copy())


def _copy_rows(rows: Tensor, into: Tensor) -> None:
    num_common = min(len(rows), len(into))
    into.zero_()
    into[:num_common].copy_(rows[:num_common])
