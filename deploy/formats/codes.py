"""Unsigned codes of 4 and 8 bits in 32-bit words, as compressed-tensors lays them out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Unsigned codes [rows, n] → int32 [rows, ⌈n·bits/32⌉], code 0 in the lowest bits; unused bits are 0."""
    per_word = 32 // bits
    rows, count = codes.shape
    padded = np.zeros((rows, -(-count // per_word) * per_word), dtype=np.uint8)
    padded[:, :count] = codes
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return np.ascontiguousarray(padded).view("<i4")


def unpack_codes(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Inverse of `pack_codes`: int32 [rows, words] → uint8 [rows, count]."""
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if bits == 4:
        nibbles = np.empty((octets.shape[0], octets.shape[1] * 2), dtype=np.uint8)
        nibbles[:, 0::2] = octets & 0x0F
        nibbles[:, 1::2] = octets >> 4
        octets = nibbles
    return np.ascontiguousarray(octets[:, :count])


def to_signed(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """code − 128."""
    return (codes ^ np.uint8(128)).view(np.int8)


def to_unsigned(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Inverse of `to_signed`."""
    return codes.view(np.uint8) ^ np.uint8(128)
