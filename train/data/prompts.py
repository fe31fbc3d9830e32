"""Prompts that exist: a JSONL file or a data set, and how they are mixed with prompts that the target writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PromptRecord:
    """The user turns of one conversation, none empty."""

    turns: tuple[str, ...]


def read_prompt_file(path: Path, key: str) -> list[PromptRecord]:
    """The records of a JSONL file: {"prompt": "…"} or {"turns": ["…", …]} in each line.

    key: the configuration's name for the path. Raises ValueError naming key and path, and the line where one is
    malformed, when the file is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path} is not a file; name a .jsonl file with one prompt a line")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} is not UTF-8 (byte {error.start}); convert it") from error
    records = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            records.append(_parse(line, f"{key}={path}, line {number}"))
    if not records:
        raise ValueError(f'{key}={path} is empty; give one JSON object a line, {{"prompt": "…"}} or {{"turns": […]}}')
    return records


def read_prompt_dataset(name: str, split: str, column: str, key: str) -> list[PromptRecord]:
    """The records of a data set (hub id or local directory) by `datasets`; the column holds texts or lists of turns.

    Raises ValueError naming `key` and what to change when it cannot be loaded, has no such column or a bad value.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}.dataset={name} (split {split}) could not be loaded: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"{key}.column={column} is not in {name}; columns: {', '.join(rows.column_names)}")
    return [_record(value, f"{key}.dataset={name}, row {number}") for number, value in enumerate(rows[column])]


def _parse(line: str, where: str) -> PromptRecord:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    value = raw.get("prompt", raw.get("turns")) if isinstance(raw, dict) else None
    return _record(value, where)


def _record(value: Any, where: str) -> PromptRecord:
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f'{where}: needs a "prompt" text or a list of "turns", none of them empty')
    for turn in turns:
        try:
            turn.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: holds {turn[error.start]!a}, half of a surrogate pair and no character; write both"
                " halves, or leave it out"
            ) from error
    return PromptRecord(tuple(turns))


class Openings:
    """How conversations begin: slot → a record, or None where the target writes its prompt itself.

    Records come in an order that their texts and the seed decide, each at most once, spread evenly over a `share` of
    the slots. Where they run out, a mix goes on with self-written prompts; a share of 1 ends.
    """

    def __init__(self, records: Iterable[PromptRecord], share: float, seed: int) -> None:
        self._share = share
        self._records = sorted(dict.fromkeys(records), key=lambda record: _digest(record, seed))

    def num_slots(self, wanted: int) -> int:
        """How many of `wanted` slots there are."""
        return wanted if self._share < 1 else min(wanted, len(self._records))

    def record(self, slot: int) -> PromptRecord | None:
        """What the slot's conversation begins with, None where the target is to write it."""
        before, after = int(slot * self._share), int((slot + 1) * self._share)
        return self._records[before] if before < after and before < len(self._records) else None


def _digest(record: PromptRecord, seed: int) -> bytes:
    return hashlib.sha256("\n".join((str(seed), *record.turns)).encode()).digest()
