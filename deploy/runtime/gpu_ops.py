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

from deploy.kernels.gpu import attention, embedding, linear16, rms_norm, rope_cache, sampling, silu_mul, w4a16
from deploy.runtime.gpu_weights import Matrix16


@dataclass(frozen=True)
class Ops:
    """Signatures are those of deploy/kernels/gpu/, one file an operation."""

    linear_w4a16: Callable[..., Tensor]
    linear_16: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    rope_cache: Callable[..., Any]
    attention: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    candidates: Callable[..., tuple[Tensor, Tensor]]

    def linear(self, x: Tensor, matrix: Any, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [rows, in] times a packed or a 16-bit matrix: [rows, out] of `out_dtype`, by default that of x."""
        if isinstance(matrix, Matrix16):
            return self.linear_16(x, matrix.weight, matrix.bias, out_dtype=out_dtype)
        return self.linear_w4a16(x, matrix, out_dtype=out_dtype)


def triton_ops() -> Ops:
    """Kernels: for CUDA tensors, and for CPU tensors in Triton's interpreter."""
    return Ops(
        linear_w4a16=w4a16.linear_w4a16,
        linear_16=linear16.linear_16,
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
        rms_norm=rms_norm.rms_norm_reference,
        add_rms_norm=rms_norm.add_rms_norm_reference,
        silu_mul=silu_mul.silu_mul_reference,
        rope_cache=rope_cache.rope_cache_reference,
        attention=attention.attention_reference,
        embedding=embedding.embedding_reference,
        sample=sampling.sample_reference,
        candidates=sampling.candidates_reference,
    )
