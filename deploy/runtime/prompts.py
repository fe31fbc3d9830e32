"""A prompts file: one JSON object a line, {"id", "category", "turns": [...]} or {"prompt": "..."}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PromptRecord:
    """One conversation's user turns, or in their place a text to be continued, as token ids.

    identity: the record's id, or its line number.
    """

    identity: str
    category: str
    turns: tuple[str, ...]
    token_ids: tuple[int, ...] = ()


def read_prompts(path: Path) -> list[PromptRecord]:
    """All records. Raises ValueError naming the file, and the line, when it is missing, empty or malformed."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: not UTF-8 (byte {error.start})") from error
    records = [_record(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not records:
        raise ValueError(f"--prompts {path}: is empty; give one JSON object a line")
    return records


def _record(path: Path, number: int, line: str) -> PromptRecord:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompts {path}, line {number}: not JSON ({error})") from error
    turns = None
    if isinstance(raw, dict):
        turns = [raw["prompt"]] if "prompt" in raw else raw.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise ValueError(f'--prompts {path}, line {number}: needs a "prompt" text or a list of "turns"')
    return PromptRecord(str(raw.get("id", number)), str(raw.get("category", "all")), tuple(turns))
