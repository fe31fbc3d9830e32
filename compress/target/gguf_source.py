"""A GGUF file as a target: metadata, precision, and its tensors as float32 under Hugging Face names.

The weights are dequantized exactly (float32 holds every value of the block formats); what the file had already lost
is lost, and `Precision` says how much that was.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize

SUPPORTED = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
"""GGUF architecture names that can be read (Mistral's files say "llama")."""

FULL_PRECISION = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. `data` are the raw blocks, [rows, bytes]; `kind` the GGML type."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def float32(self) -> np.ndarray:
        """The values in float32, shape `shape`."""
        return dequantize(self.data, self.kind).reshape(self.shape).astype(np.float32, copy=False)


class GgufFile:
    """An opened GGUF file (memory-mapped). Raises ValueError when it is damaged or not supported."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(
                f"target.path={path} is not a complete GGUF file ({error}); fetch or convert it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        if not self._tensors:
            raise ValueError(f"target.path={path} holds no tensors; fetch or convert it again")
        if self.architecture not in SUPPORTED:
            raise ValueError(
                f"target.path={path} has architecture {self.architecture!r}; supported: {', '.join(sorted(SUPPORTED))}"
                " (llama covers Llama and Mistral files)"
            )

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata.get("general.architecture"))

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """The field `<architecture>.<key>`; raises ValueError when it is missing and has no default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"target.path={self.path} lacks the field {self.architecture}.{key}; convert it again")
        return value

    def tokenizer_metadata(self) -> dict[str, Any]:
        """The `tokenizer.ggml.*` fields without that prefix."""
        prefix = "tokenizer.ggml."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def names(self) -> list[str]:
        """Tensor names as in the file."""
        return list(self._tensors)

    def tensor(self, name: str) -> GgufTensor:
        """The tensor `name` (a GGUF name)."""
        found = self._tensors[name]
        return GgufTensor(name, found.tensor_type, tuple(int(n) for n in reversed(found.shape)), found.data)

    def precision(self) -> dict[str, Any]:
        """How the source stored its weights: elements by type, bits per weight over all, and whether that is lossy."""
        elements: Counter[str] = Counter()
        num_bytes = 0
        for tensor in self._tensors.values():
            elements[tensor.tensor_type.name] += int(tensor.n_elements)
            num_bytes += int(tensor.n_bytes)
        total = sum(elements.values())
        return {
            "format": "gguf",
            "elements_by_type": dict(elements.most_common()),
            "bits_per_weight": 8 * num_bytes / total,
            "lossy": any(kind not in FULL_PRECISION for kind in elements),
        }


def hugging_face_names(file: GgufFile, num_layers: int) -> dict[str, str]:
    """Hugging Face tensor name → GGUF tensor name, for every tensor of the file that a model has.

    `rope_freqs.weight` is a table derived from the configuration, and is left out.
    """
    name_map = get_tensor_name_map(SUPPORTED[file.architecture], num_layers)
    per_layer = [
        *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o")),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        *("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"),
    ]
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in per_layer]
    found = {}
    for module in modules:
        gguf_module = name_map.get_name(module)
        for suffix in ("weight", "bias"):
            if gguf_module and f"{gguf_module}.{suffix}" in file.names():
                found[f"{module}.{suffix}"] = f"{gguf_module}.{suffix}"
    unknown = set(file.names()) - set(found.values()) - {"rope_freqs.weight"}
    if unknown:
        names = ", ".join(sorted(unknown)[:5])
        raise ValueError(f"target.path={file.path} holds tensors that no supported model has: {names}")
    return found


def unpermute_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's interleaved rotary order to Hugging Face's two halves.

    rows: [num_heads * head_dim, ...]; only files of the llama architecture are stored interleaved. Whatever belongs to
    a row (values, codes, scales) is moved by the same permutation.
    """
    head_dim = rows.shape[0] // num_heads
    shaped = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(rows.shape)


def row_order(file: GgufFile, name: str) -> int | None:
    """Number of heads by which the rows of tensor `name` (Hugging Face name) are interleaved; None: they are not."""
    if file.architecture != "llama":
        return None
    if ".q_proj." in name:
        return int(file.hyperparameter("attention.head_count"))
    if ".k_proj." in name:
        return int(file.hyperparameter("attention.head_count_kv", file.hyperparameter("attention.head_count")))
    return None
