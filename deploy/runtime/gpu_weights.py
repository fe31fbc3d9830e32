"""The weights of a model as they lie on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch

from deploy.kernels.gpu.flatten import Copies
from deploy.kernels.gpu.w4a8 import W4Channel
from deploy.kernels.gpu.w4a16 import W4
from deploy.kernels.gpu.w8a8 import W8


@dataclass(frozen=True)
class Matrix16:
    """weight: 16 bit, [out, in]. bias: fp32 [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class InputGrid:
    """How the inputs of a matrix are quantized. scale: fp32 [1]; None: each row's own. copies: of flattened ones.

    dtype: of the codes, as the matrix reads them.
    """

    bits: int
    scale: torch.Tensor | None
    copies: Copies | None
    dtype: torch.dtype


@dataclass(frozen=True)
class RowScaled:
    """A matrix that reads integers with one scale a row: docs/numerics.md, *Linear layers with whole-row scales*.

    weight: one of integers, with its own bias; or one that multiplies codes as 16-bit numbers, and then `bias`, fp32
    [out], is added behind the row's scale.
    """

    inputs: InputGrid
    weight: W8 | W4Channel | W4 | Matrix16
    bias: torch.Tensor | None = None


Matrix = W4 | Matrix16 | RowScaled
"""What a linear layer may be."""


def input_type(matrix: Matrix, dtype: torch.dtype) -> torch.dtype:
    """Of what a matrix reads: fp32 where it quantizes that, since rounding before would change codes; else `dtype`."""
    return torch.float32 if isinstance(matrix, RowScaled) else dtype


@dataclass(frozen=True)
class Layer:
    """A decoder layer. Norms fp32; q, k and v are one matrix, side by side, and so are gate and up."""

    input_norm: torch.Tensor
    qkv: Matrix
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Matrix
    post_attention_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class LanguageModel:
    """embedding: 16 bit [vocabulary, hidden]; where it is tied and the head is not trimmed, also the head's matrix.

    head_ids: int64, the tokens of a trimmed head's rows, ascending; None: all.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Matrix16
    head_ids: torch.Tensor | None


@dataclass(frozen=True)
class Head:
    """An EAGLE head. embedding: its own copy; None: the target's."""

    embedding: torch.Tensor | None
    fc: Matrix16
    hidden_norm: torch.Tensor
    layer: Layer
    norm: torch.Tensor
    head: Matrix16
    head_ids: torch.Tensor


def read_bytes(weights: LanguageModel | Head) -> int:
    """What a token reads: all, but of a matrix that serves as embedding alone a row, which is not counted."""
    embedding = weights.embedding
    is_lookup = embedding is not None and embedding.data_ptr() != weights.head.weight.data_ptr()
    return num_bytes(weights) - (num_bytes(embedding) if is_lookup else 0)


def num_bytes(weights: object) -> int:
    """Memory of all tensors; one that several parts share counts once."""
    found = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in _tensors(weights)}
    return sum(found.values())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
