"""The layout in which kernels read 4-bit codes.

Inputs are cut into blocks. Byte j of a block holds input j in its low half and input j + block/2 in its high half, so
that both halves of a loaded tile are operands of a dot as they are, with no interleaving. Bytes lie as
[blocks, out, block/2]: what a program reads of a block, for its outputs, is one contiguous piece.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def pack_halves(codes: npt.NDArray[np.uint8], block: int, padding: int = 0) -> Tensor:
    """Codes below 16, [out, in] → uint8 [⌈in/block⌉, out, block/2]; the last block is filled up with `padding`."""
    num_out, num_in = codes.shape
    padded = np.full((num_out, -(-num_in // block) * block), padding, dtype=np.uint8)
    padded[:, :num_in] = codes
    halves = padded.reshape(num_out, -1, 2, block // 2)
    octets = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return torch.from_numpy(np.ascontiguousarray(octets.transpose(1, 0, 2)))


def unpack_halves(octets: Tensor, num_in: int) -> Tensor:
    """Inverse of `pack_halves`: uint8 [blocks, out, block/2] → uint8 [out, in]."""
    codes = torch.cat((octets & 0xF, octets >> 4), dim=2)
    return codes.transpose(0, 1).reshape(octets.shape[1], -1)[:, :num_in].contiguous()
