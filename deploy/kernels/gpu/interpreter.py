"""What Triton's interpreter (`TRITON_INTERPRET=1`, kernels on CPU tensors) needs to compute what a GPU computes.

Seen with Triton 3.9: a dot of bfloat16 operands multiplies their bit patterns; a conversion from float32 to bfloat16
cuts off instead of rounding; a scalar condition & a block's is no mask. For the first two, kernels convert by
`round_to` and load operands of dots through `operand`: interpreted, bfloat16 numbers are then float32 ones of the same
value.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Settled when @triton.jit decorates a kernel, that is when its module is imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x (fp32) rounded to `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def operand(x: tl.tensor) -> tl.tensor:
    """x as loaded, to be multiplied by what `round_to` gives."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x
