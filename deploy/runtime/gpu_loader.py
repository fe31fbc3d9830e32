"""Packs the weights of a model directory, or of an EAGLE head, on the device, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from deploy.formats.speculators import EMBEDDING, EagleDirectory
from deploy.kernels.gpu.w4a16 import GROUP_SIZES, W4, pack_w4
from deploy.runtime.gpu_weights import Head, LanguageModel, Layer, Matrix16

Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Weight = GroupedInt | Float32
_KERNEL_BITS = 4


class _Loader:
    """To one device and one 16-bit type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def vector(self, values: Float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def plain(self, values: Float32, bias: Float32 | None = None) -> Matrix16:
        """Rounded to 16 bits on the device."""
        weight = torch.from_numpy(np.ascontiguousarray(values)).to(self._device).to(self._dtype)
        return Matrix16(weight, None if bias is None else self.vector(bias))

    def matrix(self, parts: Sequence[Weight], biases: Sequence[Float32]) -> W4 | Matrix16:
        """Layers that read the same input, side by side: packed where all are 4-bit groups alike, else 16 bits.

        8-bit groups have no kernel of their own: they become 16 bits, twice their size.
        """
        bias = np.concatenate(biases) if biases else None
        grouped = [part for part in parts if isinstance(part, GroupedInt)]
        forms = {(part.bits, part.group_size, part.zero_point is None) for part in grouped}
        bits, group_size, _ = next(iter(forms), (0, 0, False))
        has_kernel = bits == _KERNEL_BITS and group_size in GROUP_SIZES
        if len(grouped) < len(parts) or len(forms) > 1 or not has_kernel:
            values = [part.dequantize() if isinstance(part, GroupedInt) else part for part in parts]
            return self.plain(np.concatenate(values), bias)
        joined = grouped[0] if len(grouped) == 1 else _side_by_side(grouped)
        return pack_w4(joined, self._device, self._dtype, None if bias is None else torch.from_numpy(bias))


def _side_by_side(parts: Sequence[GroupedInt]) -> GroupedInt:
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return GroupedInt(
        np.concatenate([part.q for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.minimum for part in parts]),
        parts[0].bits,
        parts[0].group_size,
        np.concatenate(zeros) if zeros else None,
    )


def too_large(path: Path) -> str:
    """Why a model's weights are not on the device."""
    return f"{path}: its weights do not fit into the GPU's free memory; end what else uses it, or use --device cpu"


def load_language_model(
    directory: ModelDirectory, device: torch.device, dtype: torch.dtype, head_ids: Ids | None = None
) -> LanguageModel:
    """head_ids: ascending ids that the head is cut down to. Raises FormatError naming the layer that is not usable."""
    return _LanguageModelLoader(directory, _Loader(device, dtype), device).load(head_ids)


def load_eagle(head: EagleDirectory, device: torch.device, dtype: torch.dtype) -> Head:
    """Raises FormatError naming what is not usable."""
    to = _Loader(device, dtype)

    def vector(name: str) -> torch.Tensor:
        return to.vector(head.float32(f"{name}.weight"))

    def matrix(*names: str) -> Matrix16:
        loaded = to.plain(np.concatenate([head.float32(f"{name}.weight") for name in names]))
        for name in names:
            head.release(f"{name}.weight")
        return loaded

    name = "layers.0"
    has_copy = head.config.embedding == "copy"
    return Head(
        embedding=to.plain(head.float32(EMBEDDING)).weight if has_copy else None,
        fc=matrix("fc"),
        hidden_norm=vector(f"{name}.hidden_norm"),
        layer=Layer(
            input_norm=vector(f"{name}.input_layernorm"),
            qkv=matrix(*(f"{name}.self_attn.{part}_proj" for part in "qkv")),
            q_norm=None,
            k_norm=None,
            output=matrix(f"{name}.self_attn.o_proj"),
            post_attention_norm=vector(f"{name}.post_attention_layernorm"),
            gate_up=matrix(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            down=matrix(f"{name}.mlp.down_proj"),
        ),
        norm=vector("norm"),
        head=matrix("lm_head"),
        head_ids=torch.from_numpy(head.draft_ids).to(device),
    )


class _LanguageModelLoader:
    def __init__(self, directory: ModelDirectory, to: _Loader, device: torch.device) -> None:
        self._directory, self._to, self._device = directory, to, device

    def load(self, head_ids: Ids | None) -> LanguageModel:
        shape = self._directory.shape
        embedding = self._to.plain(self._float32("model.embed_tokens.weight"))
        head = embedding if shape.tied_embeddings else self._to.plain(self._float32("lm_head.weight"))
        ids = None if head_ids is None else torch.from_numpy(head_ids).to(self._device)
        if ids is not None:
            head = Matrix16(head.weight[ids].contiguous())
        return LanguageModel(
            embedding=embedding.weight,
            layers=tuple(self._layer(index) for index in range(shape.num_layers)),
            norm=self._vector("model.norm"),
            head=head,
            head_ids=ids,
        )

    def _layer(self, index: int) -> Layer:
        name, has_norms = f"model.layers.{index}", self._directory.shape.qk_norm
        return Layer(
            input_norm=self._vector(f"{name}.input_layernorm"),
            qkv=self._matrix(*(f"{name}.self_attn.{part}_proj" for part in "qkv")),
            q_norm=self._vector(f"{name}.self_attn.q_norm") if has_norms else None,
            k_norm=self._vector(f"{name}.self_attn.k_norm") if has_norms else None,
            output=self._matrix(f"{name}.self_attn.o_proj"),
            post_attention_norm=self._vector(f"{name}.post_attention_layernorm"),
            gate_up=self._matrix(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            down=self._matrix(f"{name}.mlp.down_proj"),
        )

    def _float32(self, name: str) -> Float32:
        values = self._directory.float32(name)
        self._directory.release(name)
        if not np.isfinite(values).all():
            layer = name.removesuffix(".weight")
            raise FormatError(f"{self._directory.path}: layer {layer!r} holds values that are not finite")
        return values

    def _vector(self, name: str) -> torch.Tensor:
        return self._to.vector(self._float32(f"{name}.weight"))

    def _matrix(self, *names: str) -> W4 | Matrix16:
        files = self._directory
        parts: list[Weight] = []
        for name in names:
            parts.append(self._float32(f"{name}.weight") if files.group(name) is None else files.linear(name))
            files.release(name)
        biases = [self._float32(f"{name}.bias") for name in names if f"{name}.bias" in files]
        return self._to.matrix(parts, biases)
