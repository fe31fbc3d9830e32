"""Rotary position tables: computed once in float64, rounded to float32, and handed to every backend.

RoPE (arXiv 2104.09864) in Hugging Face's half-split form, with Llama 3's frequency scaling (transformers 5.17,
`modeling_rope_utils._compute_llama3_parameters`). Deviation: transformers computes the angles in float32, whose error
grows with the position; float64 does not, and leaves nothing for two backends to disagree about.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import Llama3Scaling, ModelShape


def _scale_llama3(frequencies: npt.NDArray[np.float64], scaling: Llama3Scaling) -> npt.NDArray[np.float64]:
    """Long wavelengths divided by the factor, short ones kept, those between interpolated."""
    wavelengths = 2.0 * math.pi / frequencies
    low = scaling.original_context_length / scaling.low_freq_factor
    high = scaling.original_context_length / scaling.high_freq_factor
    smooth = (scaling.original_context_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1.0 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), between, scaled)


def rope_frequencies(shape: ModelShape) -> npt.NDArray[np.float64]:
    """Radians per position, float64 [head_dim / 2]."""
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    return frequencies if shape.rope_scaling is None else _scale_llama3(frequencies, shape.rope_scaling)


def rope_tables(
    shape: ModelShape, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin, float32 [len(positions), head_dim / 2] each."""
    angles = positions.astype(np.float64)[:, None] * rope_frequencies(shape)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
