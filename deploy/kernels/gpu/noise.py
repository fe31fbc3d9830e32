"""The noise of docs/numerics.md, *Sampling*, inside Triton kernels: Philox words, and Gumbel noise of them.

Philox4x32-10 gives four words, of which a token uses one: a block of tokens computes every word four times. That is
some hundred integer instructions a token, little beside reading the lm_head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deploy.kernels.gpu.fp32 import log32
from deploy.kernels.gpu.sampling_rows import POSITION, SAMPLE_INDEX, SEED


@triton.jit
def _word(row_ptr: tl.tensor, index: tl.constexpr) -> tl.tensor:
    return tl.load(row_ptr + index).to(tl.uint32, bitcast=True)


@triton.jit
def noise_words(tokens: tl.tensor, row_ptr: tl.tensor) -> tl.tensor:
    """The word of each token of a block, uint32; tokens: int32. row_ptr: the row's entry of `SamplingRows.table`."""
    group = (tokens >> 2).to(tl.uint32, bitcast=True)
    first, second, third, fourth = tl.philox_impl(
        group,
        _word(row_ptr, POSITION) + group * 0,
        _word(row_ptr, SAMPLE_INDEX) + group * 0,
        _word(row_ptr, SAMPLE_INDEX + 1) + group * 0,
        _word(row_ptr, SEED),
        _word(row_ptr, SEED + 1),
    )
    lane = tokens & 3
    return tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))


@triton.jit
def gumbel_noise(tokens: tl.tensor, row_ptr: tl.tensor) -> tl.tensor:
    """−log(−log(u)) of each token of a block, fp32. Arguments as of `noise_words`."""
    mantissa = (noise_words(tokens, row_ptr) >> 9).to(tl.int32, bitcast=True)
    uniform = (mantissa.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -log32(-log32(uniform))
