"""What the runtime makes of plain weights when it loads them, in numpy: so that acceptance is measured as served.

docs/numerics.md: a plain matrix becomes int8 in groups of 32 along its input, with one float32 scale each; one of an
EAGLE head 4 bits, with a scale and a minimum in fp16. A head's file holds bfloat16, so that rounding comes first.
Activations stay float32 here; the runtime quantizes them as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16
from deploy.kernels.reference.linear import GROUP, quantize_groups, quantize_weights4

if TYPE_CHECKING:
    from deploy.runtime.cpu_backend import CpuBackend

Float32 = npt.NDArray[np.float32]

SERVED_FORM = f"matrices bfloat16, then 4 bits in groups of {GROUP}; vectors bfloat16; activations float32"
BYTES_PER_WEIGHT = 1 + 4 / GROUP
BYTES_PER_HEAD_WEIGHT = 0.5 + 4 / GROUP


def served_matrix(values: Float32) -> Float32:
    """A matrix [out, in] as int8 codes times scales. Raises ValueError when 32 does not divide `in`."""
    codes, scale = quantize_groups(values)
    return codes.astype(np.float32) * np.repeat(scale, GROUP, axis=1)


def as_served(weights: Mapping[str, Float32]) -> dict[str, Float32]:
    """All weights of a head as the runtime holds them: matrices quantized, vectors (norms) as the file has them."""
    stored = {name: from_bfloat16(to_bfloat16(values)) for name, values in weights.items()}
    return {
        name: quantize_weights4(values).dequantize() if values.ndim == 2 else values for name, values in stored.items()
    }


def served_bytes(weights: Mapping[str, Float32]) -> int:
    """Memory of the head's matrices and vectors (float32) as the runtime holds them."""
    return round(sum(v.size * (BYTES_PER_HEAD_WEIGHT if v.ndim == 2 else 4) for v in weights.values()))


def read_bytes(backend: CpuBackend, num_head_rows: int) -> int:
    """Memory that a token reads of a model whose head has `num_head_rows` rows: its layers, its norms, its head.

    backend: with its whole head. Of the embedding a token looks up one row, which is not counted; where embedding and
    head are one matrix, that is the head.
    """
    shape = backend.shape
    return round(backend.weight_bytes - (shape.vocab_size - num_head_rows) * shape.hidden_size * BYTES_PER_WEIGHT)
