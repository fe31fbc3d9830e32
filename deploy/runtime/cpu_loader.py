"""Packs the weights of a model directory, or of an EAGLE head, into a native model, tensor by tensor."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.quantization_config import INT_FORMAT, QuantizationGroup
from deploy.formats.speculators import EMBEDDING, EagleDirectory
from deploy.kernels.cpu.library import (
    Runtime,
    Shape,
    SourceWeights,
    native,
    native_error,
    native_failure,
    pointer,
    require,
)

GROUP = 32  # inputs quantized together
_LANES = 16
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_FC, _HIDDEN_NORM = 7, 4  # what only heads have
_FINAL_NORM = -1
_HEAD_BITS = 4  # of a head's matrices: a draft costs what it reads, and a draft that is wrong changes no text

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """A finished native model. embedding: what it reads while it lives, where that is rows of a file."""

    handle: int
    embedding: npt.NDArray[Any] | None = None


def check_shape(shape: ModelShape) -> None:
    """The sums of docs/numerics.md need whole groups and lanes. Raises ValueError naming the size."""
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    sizes["num_heads·head_dim"] = shape.num_heads * shape.head_dim
    for key, size in sizes.items():
        if size % GROUP:
            raise ValueError(f"{key}={size} is not a multiple of {GROUP}; such models are not supported")
    if shape.head_dim % _LANES:
        raise ValueError(f"head_dim={shape.head_dim} is not a multiple of {_LANES}; such models are not supported")


def load_language_model(directory: ModelDirectory, runtime: Runtime, head_ids: Ids | None = None) -> Loaded:
    """head_ids: ascending ids that the head is cut down to. Raises FormatError naming the layer that is not usable."""
    check_shape(directory.shape)
    loader = _LanguageModelLoader(directory, runtime, head_ids)
    return loader.finish(loader.load)


def load_eagle(head: EagleDirectory, runtime: Runtime, target: int) -> Loaded:
    """target: the native model whose embedding the head shares. Raises FormatError naming what is not usable."""
    check_shape(head.config.layer)
    loader = _EagleLoader(head, runtime, target)
    return loader.finish(loader.load)


class _Loader:
    """A native model that is being filled; weights of its layers under `prefix`."""

    def __init__(self, files: ModelDirectory | EagleDirectory, runtime: Runtime, shape: Shape) -> None:
        self._files = files
        self.handle = native().us_model_create(runtime.handle, ctypes.byref(shape))
        if not self.handle:
            raise native_failure()

    def finish(self, load: Any) -> Loaded:
        try:
            embedding = load()
            require(native().us_model_finish(self.handle))
        except BaseException:
            native().us_model_destroy(self.handle)
            raise
        return Loaded(self.handle, embedding)

    def _check(self, status: int, name: str) -> None:
        if status:
            raise FormatError(f"{self._files.path}: layer {name!r} {native_error()}")

    def _set_norm(self, layer: int, which: int, name: str) -> None:
        values = self._files.float32(name)
        self._check(native().us_model_set_norm(self.handle, layer, which, pointer(values), values.size), name)

    def _set_linear(
        self, layer: int, which: int, name: str, source: SourceWeights, bias: npt.NDArray[np.float32] | None = None
    ) -> None:
        weights = source.native()
        weights.bias = pointer(bias)
        self._check(native().us_model_set_linear(self.handle, layer, which, ctypes.byref(weights)), name)
        self._files.release(name)

    def _set_head(self, name: str, source: SourceWeights, ids: Ids | None) -> None:
        self._check(native().us_model_set_head(self.handle, ctypes.byref(source.native()), pointer(ids)), name)

    def _set_embedding(self, name: str, source: SourceWeights) -> npt.NDArray[Any]:
        """Read where they lie: the array must live as long as the model."""
        number_type = source.native().scale_type
        self._check(native().us_model_set_embedding(self.handle, pointer(source.codes), number_type), name)
        return source.codes


class _LanguageModelLoader(_Loader):
    def __init__(self, directory: ModelDirectory, runtime: Runtime, head_ids: Ids | None) -> None:
        super().__init__(directory, runtime, _native_shape(directory.shape))
        self._directory, self._head_ids = directory, head_ids

    def load(self) -> npt.NDArray[Any] | None:
        """Everything; the embedding's array when it is to be read from the file.

        The head comes first: while it is packed, its source's pages are in memory, and nothing else needs as much.
        """
        shape = self._directory.shape
        embedding = self._set_ends()
        for layer in range(shape.num_layers):
            for which, name in enumerate(_NORMS if shape.qk_norm else _NORMS[:2]):
                self._set_norm(layer, which, f"model.layers.{layer}.{name}.weight")
            for which, name in enumerate(_LINEARS):
                self._set_layer(layer, which, f"model.layers.{layer}.{name}")
        self._set_norm(_FINAL_NORM, 0, "model.norm.weight")
        return embedding

    def _plain(self, name: str, row_ids: Ids | None = None) -> SourceWeights:
        values = self._directory.array(name)
        num_out, num_in = values.shape
        return SourceWeights((num_out, num_in), values, self._directory.dtype(name), row_ids=row_ids)

    def _grouped(self, name: str, group: QuantizationGroup) -> SourceWeights:
        if group.group_size is not None and group.group_size % GROUP:
            raise ValueError(f"group_size={group.group_size} is not a multiple of {GROUP}; use 32, 64 or 128")
        files, layer, inputs = self._directory, self._directory.layers[name], self._directory.inputs(name)
        scale, dtype, minimum = files.array(f"{name}.weight_scale"), files.dtype(f"{name}.weight_scale"), None
        has_float_minimum = f"{name}.weight_min" in files
        if has_float_minimum and files.dtype(f"{name}.weight_min") != dtype:
            dtype, scale = "F32", files.float32(f"{name}.weight_scale")
            minimum = files.float32(f"{name}.weight_min")
        elif has_float_minimum:
            minimum = files.array(f"{name}.weight_min")
        elif f"{name}.weight_zero_point" in files:
            minimum = files.array(f"{name}.weight_zero_point")
        is_bytes = group.format == INT_FORMAT
        columns = layer.num_in if inputs is None or inputs.flatten is None else inputs.flatten.size
        return SourceWeights(
            (layer.num_out, columns),
            files.array(f"{name}.weight" if is_bytes else f"{name}.weight_packed"),
            dtype,
            scale,
            minimum,
            group.bits,
            columns if group.group_size is None else group.group_size,
            has_float_minimum,
            is_bytes=is_bytes,
            inputs=inputs,
        )

    def _set_layer(self, layer: int, which: int, name: str) -> None:
        group = self._directory.group(name)
        source = self._plain(f"{name}.weight") if group is None else self._grouped(name, group)
        bias = self._directory.float32(f"{name}.bias") if f"{name}.bias" in self._directory else None
        self._set_linear(layer, which, name, source, bias)

    def _set_ends(self) -> npt.NDArray[Any] | None:
        """Head and embedding. Tied: one int8 matrix is both, unless the head's vocabulary is trimmed."""
        embedding, is_tied = "model.embed_tokens.weight", self._directory.shape.tied_embeddings
        name = embedding if is_tied else "lm_head.weight"
        self._set_head(name, self._plain(name, self._head_ids), self._head_ids)
        values = None
        if not is_tied:
            values = self._set_embedding(embedding, self._plain(embedding))
        elif self._head_ids is not None:
            whole = self._plain(embedding)
            self._check(native().us_model_set_embedding_int8(self.handle, ctypes.byref(whole.native())), embedding)
        self._directory.release(name)
        return values


class _EagleLoader(_Loader):
    def __init__(self, head: EagleDirectory, runtime: Runtime, target: int) -> None:
        config = head.config
        shape = _native_shape(config.layer)
        shape.num_features, shape.norm_before_residual = len(config.feature_layers), config.norm_before_residual
        super().__init__(head, runtime, shape)
        self._head, self._target = head, target

    def load(self) -> npt.NDArray[Any] | None:
        """Everything; the embedding's array when the head has one of its own."""
        self._set_head("lm_head.weight", self._plain("lm_head.weight"), self._head.draft_ids)
        for which, name in enumerate(_NORMS[:2]):
            self._set_norm(0, which, f"layers.0.{name}.weight")
        self._set_norm(0, _HIDDEN_NORM, "layers.0.hidden_norm.weight")
        names = {which: f"layers.0.{name}.weight" for which, name in enumerate(_LINEARS)} | {_FC: "fc.weight"}
        for which, name in names.items():
            self._set_linear(0, which, name, self._plain(name))
        self._set_norm(_FINAL_NORM, 0, "norm.weight")
        if self._head.config.embedding == "copy":
            return self._set_embedding(EMBEDDING, self._plain(EMBEDDING))
        require(native().us_model_share_embedding(self.handle, self._target))
        return None

    def _plain(self, name: str) -> SourceWeights:
        values = self._head.array(name)
        return SourceWeights((values.shape[0], values.shape[1]), values, "BF16", bits=_HEAD_BITS)


def _native_shape(shape: ModelShape) -> Shape:
    return Shape(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        has_qk_norm=shape.qk_norm,
        rms_norm_eps=shape.rms_norm_eps,
    )
