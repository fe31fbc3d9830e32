"""What a generated data set holds: counts for its record, and one conversation for people to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.chat_format import ChatFormat
from train.data.conversations import SHARD_PATTERN, SPLITS, Conversation, Kept, Lost, read_slots


def describe(directory: Path) -> dict[str, Any]:
    """Counts of conversations and tokens by split and temperature, of notes, and of slots lost by reason.

    Raises ValueError when nothing is left to train on.
    """
    splits: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    temperatures: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    notes: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    prompt_tokens = 0
    for slot in _slots(directory):
        prompt_tokens += slot.num_prompt_tokens
        if isinstance(slot, Lost):
            lost[slot.reason] += 1
            continue
        found = slot.conversation
        notes.update(slot.notes)
        temperatures[slot.split][f"{found.temperature:g}"] += 1
        splits[slot.split].update(
            conversations=1, tokens=len(found.token_ids), written_tokens=found.num_written, turns=len(found.spans)
        )
    if not splits["train"]:
        raise ValueError(f"generate: {_why_nothing_is_left(splits['heldout']['conversations'], lost)}")
    return {
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "conversations_by_temperature": {split: dict(sorted(counts.items())) for split, counts in temperatures.items()},
        "self_written_prompt_tokens": prompt_tokens,
        "notes": dict(sorted(notes.items())),
        "lost": dict(sorted(lost.items())),
    }


def _why_nothing_is_left(num_heldout: int, lost: Counter[str]) -> str:
    """What is wrong with a data set without training conversations, and the remedy."""
    if num_heldout:
        return (
            f"all {num_heldout} conversations are held out and none is left to train on; raise generate.num_tokens,"
            " lower generate.num_heldout or give more prompts"
        )
    reasons = ", ".join(f"{reason}: {count}" for reason, count in lost.most_common())
    return (
        f"none of {lost.total()} prompts became a conversation ({reasons}); raise generate.self_written.max_tokens"
        " where they did not end, lower generate.max_tokens where they are too long, or give others"
        " (generate=prompts generate.prompts.path=FILE)"
    )


def sample_text(directory: Path, chat: ChatFormat) -> str:
    """The first training conversation, decoded, what is trained on between ⟦ and ⟧; "" when there is none."""
    for slot in _slots(directory):
        if isinstance(slot, Kept) and slot.split == "train":
            return masked_text(slot.conversation, chat)
    return ""


def masked_text(conversation: Conversation, chat: ChatFormat) -> str:
    """A conversation's tokens as text, special tokens included, its spans between ⟦ and ⟧."""
    ids, at, parts = conversation.token_ids.tolist(), 0, []
    for begin, end in conversation.spans:
        parts += [_decoded(chat, ids[at:begin]), "⟦", _decoded(chat, ids[begin:end]), "⟧"]
        at = end
    return "".join([*parts, _decoded(chat, ids[at:])])


def _decoded(chat: ChatFormat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


def _slots(directory: Path) -> Iterator[Kept | Lost]:
    for path in sorted(directory.glob(SHARD_PATTERN)):
        yield from read_slots(path)
