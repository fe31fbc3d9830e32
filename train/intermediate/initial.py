"""Where an intermediate model starts: some layers of a model, all of them, or noise of a given shape.

Layers of a larger model are a better start than noise where training is short (layer dropping, arXiv 2204.09179): the
embedding, the head and what lies between already speak the target's language. A narrow model cannot take layers, but it
can take the embedding: projected onto its first singular directions, which keeps inner products best (Eckart-Young).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from train.intermediate.shapes import Sizes, layers_config, random_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def from_layers(
    source: ModelDirectory, layers: Sequence[int], vocab_size: int, *, unties: bool = False
) -> PreTrainedModel:
    """A model of the source's ends and these of its layers, in this order, in float32.

    vocab_size: of the target; rows of embedding and head beyond the source's, which no token of their common
    vocabulary has, are zero. unties: lm_head is a matrix of its own, as the source reads it.
    """
    model = _empty(layers_config(source.config, len(layers), vocab_size, unties=unties))
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


def write_model(lm: PreTrainedModel, config: dict[str, Any], out: Path) -> None:
    """config.json and model.safetensors, in float32; the same arguments give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in lm.state_dict().items()}
    if config.get("tie_word_embeddings", False):
        state.pop(HEAD, None)
    write_safetensors(out / "model.safetensors", state, {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
