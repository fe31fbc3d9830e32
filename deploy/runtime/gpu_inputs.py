"""What a forward is told of its rows: a few integers each, which go to the device in one copy.

The tensors are static, so that a CUDA graph that was captured with them can be replayed with other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from deploy.kernels.gpu.tiles import DECODE_BUCKETS
from deploy.runtime.backend import Row
from deploy.runtime.gpu_cache import PADDING_SLOT, Place, SlotCache

BUCKETS = DECODE_BUCKETS
"""Row counts that a forward is computed with; between them, padding rows fill up."""
MOST_ANCESTORS = 64
"""Of a row in a bucket: within one call no path beside the table is longer than the call's rows."""
_FIELDS = 6
_ALIGNMENT = 4  # integers: Triton loads whole 16 bytes where an address allows it

Int32 = npt.NDArray[np.int32]


def bucket(num_rows: int) -> int | None:
    """The smallest bucket for so many rows; None where there is none, as in a prompt."""
    return next((size for size in BUCKETS if num_rows <= size), None)


class RowInputs:
    """num_rows, num_ancestors: room. All tensors int32 [num_rows] on the device:

    tokens, positions; slots: where keys and values go, -1 of a padding row; sequences: rows of the slot table;
    cached: positions of the path that the table holds; writes: the table's entry, counted flat, that takes the slot.
    ancestors: int32 [num_rows, num_ancestors], slots of the rest of the path, the row itself last, then -1.
    states: fp32 [num_rows, state_width], what an EAGLE head's rows read; without a width, none.
    """

    def __init__(self, num_rows: int, num_ancestors: int, device: torch.device, *, state_width: int = 0) -> None:
        self.num_rows, self._num_ancestors = num_rows, num_ancestors
        self._stride = -(-num_rows // _ALIGNMENT) * _ALIGNMENT
        size = _FIELDS * self._stride + num_rows * num_ancestors
        is_cuda = device.type == "cuda"
        self.packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._staging = torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        fields = [self.packed[i * self._stride : i * self._stride + num_rows] for i in range(_FIELDS)]
        self.tokens, self.positions, self.slots, self.sequences, self.cached, self.writes = fields
        self.ancestors = self.packed[_FIELDS * self._stride :].view(num_rows, num_ancestors)
        self.states = torch.zeros((num_rows, state_width), device=device)

    def fill(self, rows: Sequence[Row], places: Sequence[Place], cache: SlotCache) -> None:
        """Rows and where they lie; the rest of the room becomes padding rows."""
        width = cache.table.shape[1]
        laid = []
        for row, place in zip(rows, places, strict=True):
            index = cache.index(row.sequence)
            write = index * width + row.position if place.is_chained else cache.nowhere
            laid.append((row.token, row.position, place.slot, index, place.cached, write))
        self._copy(self.pack(laid, [place.ancestors for place in places], cache))

    def pack(
        self,
        rows: Sequence[tuple[int, int, int, int, int, int]],
        ancestors: Sequence[Sequence[int]],
        cache: SlotCache,
    ) -> Int32:
        """The integers in the order of `packed`. rows: (token, position, slot, sequence, cached, write) of each."""
        packed = np.zeros(self.packed.numel(), dtype=np.int32)
        fields = packed[: _FIELDS * self._stride].reshape(_FIELDS, self._stride)
        fields[2], fields[5] = PADDING_SLOT, cache.nowhere
        fields[:, : len(rows)] = np.array(rows, dtype=np.int32).T
        table = packed[_FIELDS * self._stride :].reshape(self.num_rows, self._num_ancestors)
        table[:] = PADDING_SLOT
        for row, own in enumerate(ancestors):
            table[row, : len(own)] = own
        return packed

    def _copy(self, packed: Int32) -> None:
        """To the device; returns at once, and waits only while an earlier copy still reads."""
        if self._copied is not None:
            self._copied.synchronize()
        self._staging.copy_(torch.from_numpy(packed))
        self.packed.copy_(self._staging, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
