"""GGUF file → plain model directory (config.json, model.safetensors in float32, tokenizer, chat template)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from compress.target.gguf_source import GgufFile, hugging_face_names, row_order, unpermute_rows
from compress.target.gguf_tokenizer import PRE_TOKENIZERS, byte_level_bpe, pre_tokenizer_name, tokenizer_config
from deploy.formats.architectures import ModelShape, linear_layers, other_tensors

ARCHITECTURE_CLASS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TIED_TOLERANCE = 0.1
"""Relative difference up to which two stored copies of embedding and output are taken for one tied matrix."""


def convert(file: GgufFile, out: Path) -> None:
    """Writes the model directory `out`. Raises ValueError on what the file lacks or what is not supported."""
    config = model_config(file)
    names = hugging_face_names(file, config["num_hidden_layers"])
    tied_source = _tied_embedding(file, names)
    config["tie_word_embeddings"] = tied_source is not None
    config["vocab_size"] = file.tensor(names["model.embed_tokens.weight"]).shape[0]
    if tied_source is not None:
        names.pop("lm_head.weight", None)
        names["model.embed_tokens.weight"] = tied_source
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor_values(file, name, source) for name, source in names.items()}, out / "model.safetensors")
    _write_json(out / "config.json", config)
    write_tokenizer(file, out)


def check_file(file: GgufFile) -> None:
    """Raises ValueError, from metadata alone, when the file lacks what `convert` needs or holds what it cannot take."""
    config = model_config(file)
    check_tokenizer(file)
    names = hugging_face_names(file, config["num_hidden_layers"])
    embedding = names.get("model.embed_tokens.weight")
    num_tokens = file.tensor(embedding).shape[0] if embedding else len(file.tokenizer_metadata()["tokens"])
    tied = "lm_head.weight" not in names
    shape = ModelShape.from_config({**config, "vocab_size": num_tokens, "tie_word_embeddings": tied})
    needed = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    for name, size in needed.items():
        if name not in names:
            raise ValueError(f"target.path={file.path} lacks the tensor {name}; fetch or convert it again")
        found = file.tensor(names[name]).shape
        if found != size:
            raise ValueError(f"target.path={file.path}: {names[name]} is {list(found)}, its metadata say {list(size)}")


def check_tokenizer(file: GgufFile) -> None:
    """Raises ValueError when the tokenizer cannot be taken from the file."""
    metadata = file.tokenizer_metadata()
    if metadata.get("model") != "gpt2":
        raise ValueError(
            f"target.path={file.path} has tokenizer {metadata.get('model')!r}; only byte-level BPE ('gpt2') can be"
            " taken from a GGUF file: use the model's Hugging Face directory (target=hf) instead"
        )
    for key in ("tokens", "token_type", "merges"):
        if key not in metadata:
            raise ValueError(f"target.path={file.path} lacks the field tokenizer.ggml.{key}; convert it again")
    if (pre := pre_tokenizer_name(metadata)) not in PRE_TOKENIZERS:
        raise ValueError(
            f"target.path={file.path}: tokenizer.ggml.pre={pre!r} is not known (known:"
            f" {', '.join(sorted(PRE_TOKENIZERS))}); use the model's Hugging Face directory (target=hf) instead"
        )


def tensor_values(file: GgufFile, name: str, source: str) -> np.ndarray:
    """The float32 values of the tensor that is called `name` in Hugging Face order and `source` in the file."""
    values = file.tensor(source).float32()
    num_heads = row_order(file, name)
    return values if num_heads is None else unpermute_rows(values, num_heads)


def model_config(file: GgufFile) -> dict[str, Any]:
    """config.json for the file's hyperparameters. Raises ValueError on position scalings that cannot be expressed."""
    hidden_size, num_heads = file.hyperparameter("embedding_length"), file.hyperparameter("attention.head_count")
    tokens = file.tokenizer_metadata()
    return {
        "architectures": [ARCHITECTURE_CLASS[file.architecture]],
        "model_type": file.architecture,
        "num_hidden_layers": file.hyperparameter("block_count"),
        "hidden_size": hidden_size,
        "intermediate_size": file.hyperparameter("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.hyperparameter("attention.head_count_kv", num_heads),
        "head_dim": file.hyperparameter("attention.key_length", hidden_size // num_heads),
        "rms_norm_eps": _shortest_float(file.hyperparameter("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": file.hyperparameter("context_length"),
        "rope_parameters": _rope_parameters(file),
        "hidden_act": "silu",
        "bos_token_id": tokens.get("bos_token_id"),
        "eos_token_id": tokens.get("eos_token_id"),
        "pad_token_id": tokens.get("padding_token_id"),
        "dtype": "float32",
    }


def write_tokenizer(file: GgufFile, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one, chat_template.jinja."""
    check_tokenizer(file)
    metadata = file.tokenizer_metadata()
    byte_level_bpe(metadata).save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokenizer_config(metadata))
    ends = [metadata.get(key) for key in ("eos_token_id", "eot_token_id")]
    _write_json(out / "generation_config.json", {"eos_token_id": sorted({e for e in ends if e is not None})})
    template = file.metadata.get("tokenizer.chat_template")
    if template:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    theta = float(file.hyperparameter("rope.freq_base", 10000.0))
    head_dim = file.hyperparameter("embedding_length") // file.hyperparameter("attention.head_count")
    head_dim = file.hyperparameter("attention.key_length", head_dim)
    rotated = file.hyperparameter("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"target.path={file.path}: {file.architecture}.rope.dimension_count={rotated} rotates a part of each head"
            f" of {head_dim}; only whole heads are supported"
        )
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind not in ("none", "llama3"):
        raise ValueError(f"target.path={file.path}: rope scaling {kind!r} is not supported; supported: none, llama3")
    if "rope_freqs.weight" not in file.names():
        return {"rope_type": "default", "rope_theta": theta}
    return _llama3_parameters(file.tensor("rope_freqs.weight").float32(), theta, file.path)


def _llama3_parameters(factors: np.ndarray, theta: float, path: Path) -> dict[str, Any]:
    """Llama-3's scaling from the table of frequency divisors that its GGUF files carry, confirmed by recomputing it."""
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelength = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"target.path={path}: rope_freqs.weight is not Llama-3's scaling; only that one is supported")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tied_embedding(file: GgufFile, names: dict[str, str]) -> str | None:
    """The file's name of the tied matrix, None when embedding and output differ.

    Some files store a tied matrix twice at different precisions; the more precise copy is taken.
    """
    embedding, output = names["model.embed_tokens.weight"], names.get("lm_head.weight")
    if output is None:
        return embedding
    first, second = file.tensor(embedding), file.tensor(output)
    if first.shape != second.shape:
        return None
    a, b = first.float32(), second.float32()
    if np.linalg.norm(a - b) > TIED_TOLERANCE * np.linalg.norm(b):
        return None
    return embedding if first.data.nbytes >= second.data.nbytes else output


def _shortest_float(value: float) -> float:
    """The float64 with the fewest digits that rounds to the same float32 (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    written = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
