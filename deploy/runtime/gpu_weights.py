"""The weights of a model as they lie on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deploy.kernels.gpu.w4a16 import W4


@dataclass(frozen=True)
class Matrix16:
    """weight: 16 bit, [out, in]. bias: fp32 [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A decoder layer. Norms fp32; q, k and v are one matrix, side by side, and so are gate and up."""

    input_norm: torch.Tensor
    qkv: W4 | Matrix16
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: W4 | Matrix16
    post_attention_norm: torch.Tensor
    gate_up: W4 | Matrix16
    down: W4 | Matrix16


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
