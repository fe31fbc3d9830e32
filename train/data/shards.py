"""A directory of shards, each written at once: a run killed at any instant leaves whole shards and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from train.data.conversations import SHARD_PATTERN, Kept, Lost, read_slots, to_line

_NUMBER = re.compile(r"shard-(\d+)\.jsonl")
_UNFINISHED = ".unfinished"


class ShardDirectory:
    """Shards by number. Opening it removes what an interrupted write left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for path in directory.glob(f"*{_UNFINISHED}"):
            path.unlink()

    def path(self, number: int) -> Path:
        """Where a shard lies, whether or not it exists."""
        return self.directory / f"shard-{number:06}.jsonl"

    def read(self, number: int) -> list[Kept | Lost] | None:
        """The slots of a finished shard, None when there is none. Raises ValueError when it is damaged."""
        path = self.path(number)
        return list(read_slots(path)) if path.is_file() else None

    def write(self, number: int, slots: Iterable[Kept | Lost]) -> None:
        """Write a shard; it appears under its name when its bytes are on disk."""
        path = self.path(number)
        unfinished = path.with_name(path.name + _UNFINISHED)
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.writelines(to_line(slot) + "\n" for slot in slots)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)

    def num_tokens(self) -> int:
        """Tokens that the target wrote in all finished shards."""
        paths = sorted(self.directory.glob(SHARD_PATTERN))
        return sum(slot.num_written for path in paths for slot in read_slots(path))

    def remove_from(self, number: int) -> None:
        """Remove every shard of this number and above."""
        for path in self.directory.glob(SHARD_PATTERN):
            found = _NUMBER.fullmatch(path.name)
            if found and int(found[1]) >= number:
                path.unlink()
