"""The operations that the GPU backend is made of, as one table: Triton's kernels, or their definitions in torch.

The definitions run on CPU tensors, one row at a time where a library's sum would depend on the rows beside it. With
them the backend's own logic can be tested without a GPU, and without the interpreter, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploy.kernels.gpu import (
    attention,
    embedding,
    flatten,
    linear16,
    rms_norm,
    rope_cache,
    sampling,
    silu_mul,
    w4a8,
    w4a16,
    w8a8,
)
from deploy.runtime.gpu_weights import InputGrid, Matrix, Matrix16, RowScaled


@dataclass(frozen=True)
class Ops:
    """Signatures are those of deploy/kernels/gpu/, one file an operation."""

    linear_w4a16: Callable[..., Tensor]
    linear_16: Callable[..., Tensor]
    linear_w8a8: Callable[..., Tensor]
    linear_w4a8: Callable[..., Tensor]
    quantize_rows: Callable[..., tuple[Tensor, Tensor]]
    quantize_static: Callable[..., tuple[Tensor, Tensor]]
    quantize_flattened: Callable[..., tuple[Tensor, Tensor]]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    rope_cache: Callable[..., Any]
    attention: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    candidates: Callable[..., tuple[Tensor, Tensor]]

    def linear(self, x: Tensor, matrix: Matrix, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [rows, in], of the matrix's `input_type`, times it: [rows, out] of `out_dtype`, by default that of x."""
        if isinstance(matrix, RowScaled):
            return self._row_scaled(*self._quantize(x, matrix.inputs), matrix, out_dtype or x.dtype)
        if isinstance(matrix, Matrix16):
            return self.linear_16(x, matrix.weight, matrix.bias, out_dtype=out_dtype)
        return self.linear_w4a16(x, matrix, out_dtype=out_dtype)

    def _quantize(self, x: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor]:
        """Codes [rows, columns], and scales fp32 [rows] or [1]."""
        if grid.scale is None:
            return self.quantize_rows(x, grid.bits, grid.dtype)
        if grid.copies is None:
            return self.quantize_static(x, grid.scale, grid.bits, grid.dtype)
        return self.quantize_flattened(x, grid.scale, grid.copies, grid.dtype)

    def _row_scaled(self, codes: Tensor, scale: Tensor, matrix: RowScaled, out_dtype: torch.dtype) -> Tensor:
        weight = matrix.weight
        if isinstance(weight, w8a8.W8):
            return self.linear_w8a8(codes, scale, weight, out_dtype=out_dtype)
        if isinstance(weight, w4a8.W4Channel):
            return self.linear_w4a8(codes, scale, weight, out_dtype=out_dtype)
        y = self.linear(codes, weight, torch.float32) * scale[:, None]
        return (y if matrix.bias is None else y + matrix.bias).to(out_dtype)


def triton_ops() -> Ops:
    """Kernels: for CUDA tensors, and for CPU tensors in Triton's interpreter."""
    return Ops(
        linear_w4a16=w4a16.linear_w4a16,
        linear_16=linear16.linear_16,
        linear_w8a8=w8a8.linear_w8a8,
        linear_w4a8=w4a8.linear_w4a8,
        quantize_rows=w8a8.quantize_rows,
        quantize_static=w8a8.quantize_static,
        quantize_flattened=flatten.quantize_flattened,
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        silu_mul=silu_mul.silu_mul,
        rope_cache=rope_cache.rope_cache,
        attention=attention.attention,
        embedding=embedding.embedding,
        sample=sampling.sample,
        candidates=sampling.candidates,
    )


def reference_ops() -> Ops:
    """The same in plain torch."""
    return Ops(
        linear_w4a16=w4a16.linear_w4a16_reference,
        linear_16=linear16.linear_16_reference,
        linear_w8a8=w8a8.linear_w8a8_reference,
        linear_w4a8=w4a8.linear_w4a8_reference,
        quantize_rows=w8a8.quantize_rows_reference,
        quantize_static=w8a8.quantize_static_reference,
        quantize_flattened=flatten.quantize_flattened_reference,
        rms_norm=rms_norm.rms_norm_reference,
        add_rms_norm=rms_norm.add_rms_norm_reference,
        silu_mul=silu_mul.silu_mul_reference,
        rope_cache=rope_cache.rope_cache_reference,
        attention=attention.attention_reference,
        embedding=embedding.embedding_reference,
        sample=sampling.sample_reference,
        candidates=sampling.candidates_reference,
    )
