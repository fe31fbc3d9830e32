"""Packs the weights of a model directory, or of an EAGLE head, on the device, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from deploy.formats.activations import LayerInputs
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from deploy.formats.speculators import EMBEDDING, EagleDirectory
from deploy.kernels.gpu.flatten import pack_copies
from deploy.kernels.gpu.w4a8 import pack_w4_channel
from deploy.kernels.gpu.w4a16 import GROUP_SIZES, W4, pack_w4
from deploy.kernels.gpu.w8a8 import pack_w8
from deploy.runtime.gpu_weights import Head, InputGrid, LanguageModel, Layer, Matrix, Matrix16, RowScaled

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

    def matrix(self, parts: Sequence[Weight], biases: Sequence[Float32], inputs: LayerInputs | None = None) -> Matrix:
        """Layers that read the same input, side by side. inputs: how all of them quantize it, if they do.

        Such layers multiply integers where `_one_symmetric_scale_an_output` says so; others take codes for 16-bit
        numbers, which hold them exactly.
        """
        bias = np.concatenate(biases) if biases else None
        if inputs is None:
            return self._for_16_bits(parts, bias)
        weight = _one_symmetric_scale_an_output(parts)
        on_device = None if bias is None else self.vector(bias)
        if weight is None:
            return RowScaled(self._grid(inputs, self._dtype), self._for_16_bits(parts, None), on_device)
        pack = pack_w4_channel if weight.bits == _KERNEL_BITS else pack_w8
        return RowScaled(self._grid(inputs, torch.int8), pack(weight, self._device, on_device))

    def _grid(self, inputs: LayerInputs, dtype: torch.dtype) -> InputGrid:
        scale = None if inputs.scale is None else torch.tensor([inputs.scale], dtype=torch.float32).to(self._device)
        copies = None if inputs.flatten is None else pack_copies(inputs, self._device)
        return InputGrid(inputs.grid.bits, scale, copies, dtype)

    def _for_16_bits(self, parts: Sequence[Weight], bias: Float32 | None) -> W4 | Matrix16:
        """What multiplies 16-bit inputs: packed where all are 4-bit groups alike, else 16 bits.

        8-bit groups have no kernel of their own: they become 16 bits, twice their size.
        """
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


def _one_symmetric_scale_an_output(parts: Sequence[Weight]) -> GroupedInt | None:
    """The same weights side by side in 4 bits, or in 8 where one of them has 8 or a zero point beside the middle.

    None where one has several scales an output or a float minimum, or code − zero point beyond 8 bits.
    """
    codes, scales = [], []
    for part in parts:
        if not isinstance(part, GroupedInt) or part.group_size != part.shape[1] or part.zero_point is None:
            return None
        codes.append(part.q.astype(np.int16) - part.zero_point)
        scales.append(part.scale)
    is_small = all(isinstance(p, GroupedInt) and p.bits == _KERNEL_BITS and np.all(p.zero_point == 8) for p in parts)
    bits = _KERNEL_BITS if is_small else 8
    middle, shifted = 1 << (bits - 1), np.concatenate(codes)
    shifted += middle
    if shifted.min() < 0 or shifted.max() >= 2 * middle:
        return None
    num_in = shifted.shape[1]
    return GroupedInt.from_zero_point(
        shifted.astype(np.uint8), np.concatenate(scales), middle, bits=bits, group_size=num_in
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

    def _matrix(self, *names: str) -> Matrix:
        files = self._directory
        parts: list[Weight] = []
        for name in names:
            parts.append(self._float32(f"{name}.weight") if files.group(name) is None else files.linear(name))
            files.release(name)
        biases = [self._float32(f"{name}.bias") for name in names if f"{name}.bias" in files]
        return self._to.matrix(parts, biases, files.inputs(names[0]))  # its reader has checked that they agree
