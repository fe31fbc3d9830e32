"""Where the keys and values of all sequences lie on the device: one pool of slots, and a table of each sequence's.

Keeping a path moves no key: it changes which slots the table names. Rows that follow what is kept as a chain are
written into the table at once, behind it; rows beside that chain (a tree's branches) name their ancestors' slots
themselves. Attention reads both in the order of positions, so where a path lies does not change a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deploy.formats.architectures import ModelShape
from deploy.runtime.backend import SEQUENCE_END, Row, check_path, check_truncation

PADDING_SLOT = -1
_FIRST_SLOTS, _FIRST_WIDTH, _FIRST_SEQUENCES = 512, 512, 8


@dataclass(frozen=True)
class Place:
    """Where a provisional row lies. cached: positions of its path that the table holds.

    ancestors: slots of the rest of its path, itself last. is_chained: the table also holds the row itself.
    """

    cached: int
    ancestors: tuple[int, ...]
    is_chained: bool

    @property
    def slot(self) -> int:
        return self.ancestors[-1]


@dataclass
class _Sequence:
    """index: its row of the table. tokens, slots: of what is kept. rows: its provisional rows, as the call counts."""

    index: int
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    num_chained: int = 0
    rows: list[int] = field(default_factory=list)


class SlotCache:
    """Keys and values: `keys[layer]`, `values[layer]`, fp16 [num_slots, kv_heads, head_dim].

    table: int32 [sequences + 1, width], position → slot; its last entry takes what is to be written nowhere.
    generation: changes whenever one of these tensors is another one than before.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self.generation = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._num_slots = 0
        self._free: list[int] = []
        self._grow_slots(_FIRST_SLOTS)
        width = min(_FIRST_WIDTH, -(-shape.context_length // 32) * 32)
        self.table = torch.zeros((_FIRST_SEQUENCES + 1, width), dtype=torch.int32, device=device)
        self._free_indices = list(reversed(range(_FIRST_SEQUENCES)))
        self._sequences: dict[int, _Sequence] = {}
        self._writes: dict[tuple[int, int], int] = {}  # (row of the table, position) → slot that is to stand there
        self.rows: list[Row] = []  # provisional ones, as `keep` counts them
        self._places: list[Place | None] = []  # None: kept or dropped

    @property
    def num_bytes(self) -> int:
        """Memory of keys, values and table."""
        tensors = [*self.keys, *self.values, self.table]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def nowhere(self) -> int:
        """The table's entry, counted flat, for what is to be written nowhere."""
        return self.table.numel() - 1

    def length(self, sequence: int) -> int:
        """Tokens that are kept."""
        return len(self._sequences[sequence].tokens) if sequence in self._sequences else 0

    def lengths(self) -> dict[int, int]:
        return {key: len(found.tokens) for key, found in self._sequences.items()}

    def tokens(self, sequence: int) -> list[int]:
        """The tokens that are kept."""
        return self._sequences[sequence].tokens

    def index(self, sequence: int) -> int:
        """The sequence's row of the table."""
        return self._sequences[sequence].index

    def earlier(self) -> list[Row | None]:
        """The provisional rows that a call may continue; None in place of one that is gone."""
        pairs = zip(self.rows, self._places, strict=True)
        return [row if place is not None else None for row, place in pairs]

    def path_tokens(self, index: int) -> list[int]:
        """Tokens of the path of a provisional row: what is kept, its ancestors, itself."""
        ancestors, sequence = [], self.rows[index].sequence
        while index != SEQUENCE_END:
            ancestors.append(self.rows[index].token)
            index = self.rows[index].parent
        return [*self._sequences[sequence].tokens, *reversed(ancestors)]

    def begin(self, rows: Sequence[Row], *, continues: bool = False) -> list[Place]:
        """Lay out the rows of a new call; without `continues`, drop the provisional rows of those before."""
        if not continues:
            self.drop_rows()
        slots = self.borrow(len(rows))
        places = []
        for row, slot in zip(rows, slots, strict=True):
            sequence = self._sequence(row.sequence)
            place = self._place(sequence, row, slot)
            if place.is_chained:
                sequence.num_chained += 1
            sequence.rows.append(len(self.rows))
            self.rows.append(row)
            self._places.append(place)
            places.append(place)
        self.reserve(max(row.position for row in rows) + 1)
        return places

    def _place(self, sequence: _Sequence, row: Row, slot: int) -> Place:
        above = None if row.parent == SEQUENCE_END else self._places[row.parent]
        if above is not None and not above.is_chained:
            return Place(above.cached, (*above.ancestors, slot), is_chained=False)
        return Place(row.position, (slot,), row.position == len(sequence.tokens) + sequence.num_chained)

    def drop_rows(self) -> None:
        """Forget all provisional rows."""
        for sequence in self._sequences.values():
            self._drop_rows_of(sequence)
        self.rows, self._places = [], []

    def _drop_rows_of(self, sequence: _Sequence, kept: frozenset[int] = frozenset()) -> None:
        for index in reversed(sequence.rows):
            place = self._places[index]
            assert place is not None
            if index not in kept:
                self._free.append(place.slot)
            self._places[index] = None
        sequence.rows, sequence.num_chained = [], 0

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        """As of a Backend. Raises ValueError naming the row that does not follow the one before it."""
        found = self._sequences.get(sequence)
        check_path(sequence, path, {index: self.rows[index] for index in found.rows} if found else {})
        if found is None:
            return
        for index in path:
            place = self._places[index]
            assert place is not None
            if not place.is_chained:
                self._writes[found.index, len(found.slots)] = place.slot
            found.slots.append(place.slot)
            found.tokens.append(self.rows[index].token)
        self._drop_rows_of(found, frozenset(path))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the sequence's tokens from `length` on, and its provisional rows. ValueError when it has fewer."""
        check_truncation(length, self.length(sequence))
        if (found := self._sequences.get(sequence)) is None:
            return
        self._drop_rows_of(found)
        self._free += reversed(found.slots[length:])
        del found.slots[length:], found.tokens[length:]

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        if sequence in self._sequences:
            self.truncate(sequence, 0)
            self._free_indices.append(self._sequences.pop(sequence).index)

    def borrow(self, count: int) -> list[int]:
        """Slots for `count` rows, which are given back by `give_back` unless rows of `begin` have them."""
        if count > len(self._free):
            self._grow_slots(max(2 * self._num_slots, self._num_slots + count - len(self._free)))
        rest = len(self._free) - count
        slots = self._free[rest:]
        del self._free[rest:]
        slots.reverse()
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        self._free += reversed(slots)

    def write_table(self) -> None:
        """Bring what was kept beside a chain into the table; before the next forward."""
        if not self._writes:
            return
        width = self.table.shape[1]
        flat = [(index * width + position, slot) for (index, position), slot in self._writes.items()]
        self._writes = {}
        where, slots = torch.tensor(flat, dtype=torch.int64).T.to(self._device)
        self.table.view(-1).index_copy_(0, where, slots.to(torch.int32))

    def _sequence(self, key: int) -> _Sequence:
        if key not in self._sequences:
            if not self._free_indices:
                self._grow_table(2 * (len(self.table) - 1), self.table.shape[1])
            self._sequences[key] = _Sequence(self._free_indices.pop())
        return self._sequences[key]

    def reserve(self, length: int) -> None:
        """Room in the table for paths of that length."""
        width = self.table.shape[1]
        if length > width:
            self._grow_table(len(self.table) - 1, max(2 * width, -(-length // 32) * 32))

    def _grow_table(self, sequences: int, width: int) -> None:
        """A larger table with what the old one holds."""
        self.write_table()
        old = self.table
        self.table = torch.zeros((sequences + 1, width), dtype=torch.int32, device=self._device)
        self.table[: len(old) - 1, : old.shape[1]] = old[:-1]
        self._free_indices = [*reversed(range(len(old) - 1, sequences)), *self._free_indices]
        self.generation += 1

    def _grow_slots(self, num_slots: int) -> None:
        """One layer after another, so that no more than one is there twice."""
        size = (num_slots, self._shape.num_kv_heads, self._shape.head_dim)
        layers = range(self._shape.num_layers)
        self.generation += 1  # also where memory ends half-way: some layers' tensors are then others
        try:
            for cache in (self.keys, self.values):
                for layer in layers:
                    grown = torch.zeros(size, dtype=torch.float16, device=self._device)
                    if layer < len(cache):
                        grown[: self._num_slots] = cache[layer]
                        cache[layer] = grown
                    else:
                        cache.append(grown)
        except torch.OutOfMemoryError as error:
            gib = 2 * len(layers) * 2 * num_slots * size[1] * size[2] / 2**30
            raise MemoryError(
                f"a cache of {num_slots} tokens needs {gib:.1f} GiB, more than the GPU has left; answer fewer or "
                "shorter texts at once, or use --device cpu"
            ) from error
        self._free = [*reversed(range(self._num_slots, num_slots)), *self._free]
        self._num_slots = num_slots
