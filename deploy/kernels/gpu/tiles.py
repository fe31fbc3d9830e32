"""How a linear layer is cut into programs: what the configuration tables of the linear kernels hold.

The weight is the left operand of every dot, [outputs, inputs] · [inputs, rows]: outputs fill a matrix instruction's 64
rows also where there is one row of activations, and Hopper takes a left operand that was unpacked in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Rows of a call for which a CUDA graph is made. Calls of more rows are prefill.
DECODE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
PREFILL = 512


@dataclass(frozen=True)
class Tile:
    """A program's share: `block_out` outputs of `block_rows` rows, and what it may use of a multiprocessor."""

    block_rows: int
    block_out: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        """As the keyword arguments of a linear kernel."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_OUT": self.block_out,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds `rows`; PREFILL where no decode bucket does."""
    return next((bucket for bucket in DECODE_BUCKETS if rows <= bucket), PREFILL)


def tile_for(table: Mapping[int, Tile], rows: int) -> Tile:
    """The entry of an operation's table (bucket → tile) for a call of `rows`."""
    return table[bucket_of(rows)]
