"""Tiny models and bundles, made afresh for each test that asks."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.architectures import LinearLayer, ModelShape, linear_layers, other_tensors
from deploy.formats.bundle import MANIFEST, write_manifest
from deploy.formats.chat import ChatTemplate
from deploy.formats.components import used_extensions
from deploy.formats.digest import sha256_file
from deploy.formats.draft_vocabulary import write_draft_vocabulary
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord, record_json
from deploy.formats.packed import GroupedInt, encode
from deploy.formats.quantization_config import QuantizationGroup, quantization_config
from deploy.formats.safetensors_file import BFloat16, from_bfloat16, to_bfloat16, write_safetensors
from deploy.formats.speculators import tensor_contract, write_eagle

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Quantized:
    """How the linear layers of a tiny model are packed.

    group_size: None for a scale per output. inputs: how inputs are quantized; expansion: C'/C of flattened ones.
    """

    bits: int = 4
    group_size: int | None = 32
    form: str = "asymmetric"  # or "symmetric", "minimum"
    inputs: ActivationGrid | None = None
    expansion: float = 1.0


# Layers that quantize their inputs, in every way and beside others: by a pattern in the name. For two decoder layers of
# inputs that are multiples of 32.
MIXED = {
    "self_attn.[qkv]": Quantized(4, None, "symmetric", ActivationGrid(4, "tensor"), 1.3),
    "o_proj": Quantized(8, None, "symmetric", ActivationGrid(8, "token")),
    "layers.0.mlp.(gate|up)": Quantized(8, 32, "asymmetric", ActivationGrid(8, "tensor"), 1.1),
    "layers.0.mlp.down": Quantized(4, 32, "minimum", ActivationGrid(4, "token")),
    "layers.1.mlp.(gate|up)": Quantized(),
    "layers.1.mlp.down": Quantized(4, None, "asymmetric", ActivationGrid(8, "tensor"), 1.2),
}


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": model_type,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 263,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 2,
    }
    return config | changes


def random_inputs(rng: np.random.Generator, num_in: int, quantized: Quantized, limit: float = 2.0) -> LayerInputs:
    """A static scale whose grid ends near `limit`; copies of random channels, in whole groups of 32 columns."""
    assert quantized.inputs is not None
    if quantized.inputs.scope == "token":
        return LayerInputs(quantized.inputs)
    scale = float(np.float32(limit * rng.uniform(0.8, 1.2) / quantized.inputs.qmax))
    if quantized.expansion == 1.0:
        return LayerInputs(quantized.inputs, scale)
    extra = -(-int(num_in * (quantized.expansion - 1)) // 32) * 32
    columns = np.concatenate([np.arange(num_in), rng.integers(0, max(1, num_in // 4), extra) * 3 % num_in])
    return LayerInputs(quantized.inputs, scale, np.sort(columns).astype(np.int32))


def random_grouped(rng: np.random.Generator, num_out: int, num_in: int, quantized: Quantized) -> GroupedInt:
    group_size = num_in if quantized.group_size is None else quantized.group_size
    bits, groups = quantized.bits, num_in // group_size
    q = rng.integers(0, 1 << bits, (num_out, num_in), dtype=np.uint8)
    scale = from_bfloat16(to_bfloat16((rng.uniform(0.5, 1.5, (num_out, groups)) / (1 << bits)).astype(np.float32)))
    if quantized.form == "minimum":
        minimum = rng.uniform(-0.7, -0.3, (num_out, groups)).astype(np.float16).astype(np.float32)
        half = scale.astype(np.float16).astype(np.float32)
        return GroupedInt(q, half, minimum, bits, group_size)
    zeros: Any = 1 << (bits - 1)
    if quantized.form == "asymmetric":
        zeros = rng.integers(0, 1 << bits, (num_out, groups), dtype=np.uint8)
    return GroupedInt.from_zero_point(q, scale, zeros, bits=bits, group_size=group_size)


Layers = Quantized | Mapping[str, Quantized | None] | None


def _kind_of(name: str, layers: Layers) -> Quantized | None:
    """How layer `name` is packed, None for plain; a mapping's keys are patterns found in the name."""
    if not isinstance(layers, Mapping):
        return layers
    return next((kind for pattern, kind in layers.items() if re.search(pattern, name)), None)


def _encode_layer(rng: np.random.Generator, layer: LinearLayer, quantized: Quantized, seed: int) -> dict[str, Any]:
    inputs, num_columns = None, layer.num_in
    if quantized.inputs is not None:
        # Layers that read the same rows quantize them alike.
        source = re.sub("[qkv]_proj|gate_proj|up_proj", "norm", layer.name)
        inputs = random_inputs(np.random.default_rng([seed, *source.encode()]), layer.num_in, quantized)
        num_columns = layer.num_in if inputs.flatten is None else inputs.flatten.size
    grouped = random_grouped(rng, layer.num_out, num_columns, quantized)
    dtype = "F16" if quantized.form == "minimum" else "BF16"
    return dict(encode(layer.name, grouped, dtype, symmetric=quantized.form == "symmetric", inputs=inputs))


def _config_group(kind: Quantized, targets: tuple[str, ...]) -> QuantizationGroup:
    return QuantizationGroup(
        targets,
        kind.bits,
        kind.group_size,
        symmetric=kind.form == "symmetric",
        float_minimum=kind.form == "minimum",
        activations=kind.inputs,
        flatten=kind.expansion != 1.0,
    )


def write_model(
    directory: Path, config: dict[str, Any], quantized: Layers = None, seed: int = 0, spread: float = 1.0
) -> Path:
    """quantized: of all linear layers, or by a pattern that is found in a layer's name."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, shape = np.random.default_rng(seed), ModelShape.from_config(config)
    tensors: dict[str, Any] = {}
    for name, size in other_tensors(shape).items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        values = (mean + 0.3 * spread * rng.standard_normal(size)).astype(np.float32)
        tensors[name] = BFloat16(to_bfloat16(values))
    targets: dict[Quantized, list[str]] = {}
    for layer in linear_layers(shape):
        kind = _kind_of(layer.name, quantized)
        if kind is None:
            weight = (rng.standard_normal((layer.num_out, layer.num_in)) * 0.1).astype(np.float32)
            tensors[f"{layer.name}.weight"] = BFloat16(to_bfloat16(weight))
            continue
        targets.setdefault(kind, []).append(layer.name)
        tensors |= _encode_layer(rng, layer, kind, seed)
    if targets:
        is_whole = isinstance(quantized, Quantized)
        groups = [_config_group(kind, ("Linear",) if is_whole else tuple(names)) for kind, names in targets.items()]
        config = config | {"quantization_config": quantization_config(groups)}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: one token a byte, so that characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index + len(SPECIAL) for index, token in enumerate(alphabet)}
    vocabulary |= {token: index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write_bundle(directory: Path, quantized: Layers = None, **manifest: Any) -> Path:
    quantized = quantized or Quantized()
    write_model(directory / "target", tiny_config(), quantized)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "report.html").write_text("<!doctype html><title>report</title>")
    (directory / "README.md").write_text("# A tiny model\n")
    arguments: dict[str, Any] = {
        "name": "tiny",
        "components": {"target": "target"},
        "provenance": {"source": {"kind": "random", "seed": 0}},
        "licence": "apache-2.0",
        "quality": [{"method": "rtn", "prose": 12.5}],
        "extensions": sorted(used_extensions(directory, "target")),
    }
    write_manifest(directory, **(arguments | manifest))
    return directory


def owner_of(bundle: Path, role: str) -> Owner:
    """Of a drafter that belongs to the bundle's model of that role."""
    return Owner(
        content="c" * 64,
        model_files={name: sha256_file(bundle / role / name) for name in ("config.json", "model.safetensors")},
        tokenizer=sha256_file(bundle / "tokenizer.json"),
        chat_template=ChatTemplate((bundle / "chat_template.jinja").read_text()).identity,
    )


def write_hierarchy(path: Path, ids: Any, owners: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A bundle with an intermediate and a head for each model, its manifest still without them (`finish_hierarchy`).

    ids: draft vocabulary of the intermediate. owners: role → fields of its Owner, another's. changes: of config.json of
    the intermediate.
    """
    owners = owners or {}
    write_bundle(path)
    write_model(path / "intermediate", tiny_config() | {"num_hidden_layers": 1} | changes, Quantized(), seed=5)
    record = record_json(
        replace(owner_of(path, "target"), **owners.get("intermediate", {})), training_record(settings={})
    )
    (path / "intermediate" / "training.json").write_text(json.dumps(record))
    if ids is not None:
        write_draft_vocabulary(path / "intermediate", ids)
    for role, above in (("eagle-target", "target"), ("eagle-intermediate", "intermediate")):
        owner = replace(owner_of(path, above), **owners.get(role, {}))
        shape = ModelShape.from_config(json.loads((path / above / "config.json").read_text()))
        write_head(path / role, shape, owner, feature_layers=(0, shape.num_layers))
    return path


HIERARCHY = ("target", "intermediate", "eagle-target", "eagle-intermediate")


def finish_hierarchy(path: Path, roles: tuple[str, ...] = HIERARCHY) -> Path:
    (path / MANIFEST).unlink(missing_ok=True)
    write_manifest(path, name="tiny", components={r: r for r in roles}, provenance={}, licence="x")
    return path


ACCEPTANCE = Acceptance((0.5, 0.25, 0.125), 1.875)
HEAD: dict[str, Any] = {
    "draft_vocab_size": 37,
    "feature_layers": (0, 1, 2),
    "norm_before_residual": True,
    "num_drafted": 3,
    "embedding": "reference",
}


def training_record(**changes: Any) -> TrainingRecord:
    fields: dict[str, Any] = {
        "tokens": 4096,
        "seconds": 12.5,
        "served": ACCEPTANCE,
        "served_form": "int8, groups of 32",
        "plain": Acceptance((0.55, 0.3, 0.15), 2.0),
        "cost_ratio": 0.1,
        "mbsu": 1.4,
        "settings": {"unrolls": 3},
        "data": {"conversations": 7},
    }
    return TrainingRecord(**(fields | changes))


def write_head(
    path: Path,
    target: ModelShape,
    owner: Owner,
    seed: int = 0,
    training: TrainingRecord | None = None,
    spread: float = 1.0,
    **choices: Any,
) -> tuple[EagleConfig, dict[str, Any], Any]:
    """A head of random weights and a random draft vocabulary; returns its configuration, weights and ids.

    spread: standard deviation of its matrices.
    """
    rng = np.random.default_rng(seed)
    config = EagleConfig.for_target(target, **(HEAD | choices))
    sizes = {name: size for name, (dtype, size) in tensor_contract(config).items() if dtype == "BF16"}
    weights = {
        name: ((spread if len(size) == 2 else 1.0) * rng.standard_normal(size)).astype(np.float32)
        for name, size in sizes.items()
    }
    ids = np.sort(rng.choice(target.vocab_size, config.draft_vocab_size, replace=False)).astype(np.int64)
    write_eagle(path, config, weights, ids, owner, training or training_record())
    return config, weights, ids


def write_bundle_with_head(directory: Path, target: Layers = None, **changes: Any) -> Path:
    """A bundle whose head belongs to its target; changes: fields of Owner, to make it another's."""
    bundle = write_bundle(directory, target)
    owner = Owner(
        content="c" * 64,
        model_files={file.name: sha256_file(file) for file in (bundle / "target").iterdir()},
        tokenizer=sha256_file(bundle / "tokenizer.json"),
        chat_template=ChatTemplate(TEMPLATE).identity,
    )
    write_head(bundle / "eagle-target", ModelShape.from_config(tiny_config()), replace(owner, **changes))
    return write_bundle(directory, target, components={"target": "target", "eagle-target": "eagle-target"})


def plan_json() -> dict[str, Any]:
    """plan.json of a bundle with a head, as if measured."""
    plain = {
        "tau": 1.0,
        "survival": [],
        "acceptance_by_position": [],
        "nodes_per_round": 0.0,
        "levels_per_round": 0.0,
        "width": 1,
        "draft_ms": 0.0,
        "decode_tok_s": 500.0,
        "predicted_tok_s": 510.0,
    }
    eagle = plain | {"tau": 1.7, "survival": [0.5, 0.2], "acceptance_by_position": [0.5, 0.4], "nodes_per_round": 2.0}
    eagle |= {"levels_per_round": 2.0, "draft_ms": 0.3, "decode_tok_s": 700.0, "predicted_tok_s": 710.0}
    costs = {
        "version": 1,
        "rows_ms": {"target": {"1": 2.0, "4": 2.4}},
        "drafts": {"eagle-target": {"first_ms": 0.2, "level_ms": {"1": 0.1, "4": 0.2}}},
    }
    machine = {"cpu": "one", "family_model": "1/2", "cores": 2, "isa": "avx2", "threads": 2, "load_average": 0.1}
    modes = {"plain": plain, "eagle": eagle}
    return {"version": 1, "machine": machine, "costs": costs, "modes": modes, "choice": "eagle"}


class Tiny:
    """Makers of tiny things."""

    HEAD = HEAD
    MIXED = MIXED
    head = staticmethod(write_head)
    plan = staticmethod(plan_json)
    training_record = staticmethod(training_record)
    bundle_with_head = staticmethod(write_bundle_with_head)

    Quantized = Quantized
    config = staticmethod(tiny_config)
    Grid = ActivationGrid
    grouped = staticmethod(random_grouped)
    inputs = staticmethod(random_inputs)
    model = staticmethod(write_model)
    tokenizer = staticmethod(byte_tokenizer)
    bundle = staticmethod(write_bundle)
    hierarchy = staticmethod(write_hierarchy)
    finish_hierarchy = staticmethod(finish_hierarchy)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
