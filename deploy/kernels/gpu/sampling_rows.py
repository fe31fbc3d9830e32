"""How each row of a call is sampled, in one tensor on the device: one copy a call, and one address for a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from deploy.runtime.sampling import SamplingParams

_ROW = np.dtype(
    {
        "names": [
            "temperature",
            "min_p",
            "top_p",
            "repetition_penalty",
            "top_k",
            "sample_index",
            "seed",
            "position",
        ],
        "formats": ["<f4", "<f4", "<f8", "<f4", "<i4", "<u8", "<u8", "<u4"],
        "offsets": [0, 4, 8, 16, 20, 24, 32, 40],
        "itemsize": 48,
    }
)
# Where kernels find a field, in words of 32 bits.
NUM_WORDS = tl.constexpr(12)
TEMPERATURE, MIN_P, TOP_P, TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(5)
SAMPLE_INDEX, SEED, POSITION = tl.constexpr(6), tl.constexpr(8), tl.constexpr(10)
_PENALTY = 4
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRows:
    """Parameters, sample index and the position of the token to be chosen, of every row; `table` is all of it.

    table: int32 [rows, 12] on the device, fields as their bits; truncation is left out of rows with temperature 0.
    """

    params: tuple[SamplingParams, ...]
    sample_indices: tuple[int, ...]
    positions: tuple[int, ...]
    table: Tensor

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        sample_indices: Sequence[int],
        positions: Sequence[int],
        device: torch.device,
    ) -> SamplingRows:
        """One entry of each for every row. Raises ValueError when there are more or fewer."""
        if not len(params) == len(sample_indices) == len(positions):
            raise ValueError(
                f"{len(params)} rows of sampling parameters need as many sample indices and positions, "
                f"got {len(sample_indices)} and {len(positions)}"
            )
        fields = np.zeros(len(params), dtype=_ROW)
        for field, how, index, position in zip(fields, params, sample_indices, positions, strict=True):
            is_random = how.temperature > 0
            field["temperature"], field["repetition_penalty"] = how.temperature, how.repetition_penalty
            field["min_p"] = how.min_p if is_random else 0
            field["top_p"] = how.top_p if is_random else 1
            field["top_k"] = min(how.top_k, np.iinfo(np.int32).max) if is_random else 0
            field["sample_index"], field["seed"], field["position"] = index & _MASK, how.seed, position
        table = torch.from_numpy(fields.view(np.int32).reshape(-1, NUM_WORDS.value)).to(device)
        return cls(tuple(params), tuple(sample_indices), tuple(positions), table)

    @property
    def has_penalty(self) -> bool:
        return any(how.repetition_penalty != 1 for how in self.params)

    @property
    def has_truncation(self) -> bool:
        return any(how.temperature > 0 and (how.top_k or how.top_p < 1 or how.min_p > 0) for how in self.params)

    @property
    def divisors(self) -> Tensor:
        """What logits are divided by: the temperature, 1 where it is 0. fp32 [rows]."""
        temperature = self.table[:, TEMPERATURE.value].view(torch.float32)
        return torch.where(temperature > 0, temperature, 1.0)

    @property
    def penalties(self) -> Tensor:
        """fp32 [rows]."""
        return self.table[:, _PENALTY].view(torch.float32)
