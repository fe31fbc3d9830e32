"""Rotary position tables (RoPE, arXiv 2104.09864) as docs/numerics.md has them: angles in float64, rounded once."""

import math

import torch
from torch import Tensor

from deploy.formats.architectures import Llama3Scaling, ModelShape


def rope_tables(shape: ModelShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at integer positions [n]: float32 [n, head_dim / 2] each."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device=positions.device) / shape.head_dim
    frequencies = shape.rope_theta**-exponents
    if shape.rope_scaling is not None:
        frequencies = _scale_llama3(frequencies, shape.rope_scaling)
    angles = positions[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _scale_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Frequencies that turn rarely within the original context divided by the factor, frequent ones kept, a ramp
    between (transformers, `_compute_llama3_parameters`)."""
    turns = scaling.original_context_length * frequencies / (2.0 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)
