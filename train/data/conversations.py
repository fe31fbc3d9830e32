"""Conversations that the target took part in, as token ids with the ranges that it wrote, and the files of them.

A shard holds one line for each of its slots, the places that a conversation may fill: the conversation, or why there is
none. Everything that is known about a data set therefore follows from its lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "heldout")
SHARD_PATTERN = "shard-[0-9]*.jsonl"


@dataclass(frozen=True)
class Conversation:
    """token_ids: int32 [n], as served, the end token included. spans: half-open ranges that the target wrote.

    A span includes the end token that the target wrote (one cut off at the length limit has none). temperature: at
    which the responses were sampled (0: greedy). index: unique in a data set.
    """

    token_ids: npt.NDArray[np.int32]
    spans: tuple[tuple[int, int], ...]
    temperature: float
    index: int

    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """bool [n], True at tokens that the target wrote."""
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for begin, end in self.spans:
            mask[begin:end] = True
        return mask

    @property
    def num_written(self) -> int:
        """Tokens that the target wrote."""
        return sum(end - begin for begin, end in self.spans)


@dataclass(frozen=True)
class Kept:
    """A slot's conversation.

    prompt: text of the first user turn. num_prompt_tokens: how many tokens the target wrote as user turns.
    notes: what happened to it that is worth counting ("cut", "not extended", …).
    """

    conversation: Conversation
    split: str
    prompt: str
    num_prompt_tokens: int
    notes: tuple[str, ...]

    @property
    def num_written(self) -> int:
        """Tokens that the target wrote, user turns and responses."""
        return self.num_prompt_tokens + self.conversation.num_written


@dataclass(frozen=True)
class Lost:
    """A slot without a conversation. num_prompt_tokens: written by the target for nothing."""

    index: int
    reason: str
    num_prompt_tokens: int

    @property
    def num_written(self) -> int:
        """Tokens that the target wrote."""
        return self.num_prompt_tokens


def to_line(slot: Kept | Lost) -> str:
    """One line of JSON."""
    if isinstance(slot, Lost):
        return json.dumps({"index": slot.index, "lost": slot.reason, "num_prompt_tokens": slot.num_prompt_tokens})
    found = slot.conversation
    record = {
        "index": found.index,
        "split": slot.split,
        "temperature": found.temperature,
        "prompt": slot.prompt,
        "num_prompt_tokens": slot.num_prompt_tokens,
        "notes": slot.notes,
        "spans": found.spans,
        "token_ids": found.token_ids.tolist(),
    }
    return json.dumps(record, ensure_ascii=False)


def from_record(record: Mapping[str, Any]) -> Kept | Lost:
    """Inverse of `to_line`, from parsed JSON."""
    if "lost" in record:
        return Lost(record["index"], record["lost"], record["num_prompt_tokens"])
    conversation = Conversation(
        token_ids=np.array(record["token_ids"], dtype=np.int32),
        spans=tuple((begin, end) for begin, end in record["spans"]),
        temperature=record["temperature"],
        index=record["index"],
    )
    return Kept(conversation, record["split"], record["prompt"], record["num_prompt_tokens"], tuple(record["notes"]))


def read_slots(path: Path) -> Iterator[Kept | Lost]:
    """The slots of one shard, in order. Raises ValueError naming file and line where one is damaged."""
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield from_record(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: is damaged ({error}); generate it again") from error


def read_conversations(directory: Path, split: str) -> list[Conversation]:
    """The conversations of a split ("train" or "heldout") of a data set, by ascending index.

    Raises ValueError when the directory holds none of that split, and where a line is damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use {' or '.join(SPLITS)}")
    slots = (slot for path in sorted(directory.glob(SHARD_PATTERN)) for slot in read_slots(path))
    found = [slot.conversation for slot in slots if isinstance(slot, Kept) and slot.split == split]
    if not found:
        raise ValueError(f"{directory}: holds no {split} conversations; generate some")
    return found
