"""One slot of a data set, turn by turn: what to ask the engine next, given what it answered.

Both parts are generators: they yield requests and are sent completions, so that many can be under way at a time and
each still reads from top to bottom.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from train.data.chat_format import ChatFormat, Message
from train.data.conversations import Conversation, Kept, Lost
from train.data.engines.base import Completion, Request
from train.data.loops import is_looping, until_loop
from train.data.prompts import PromptRecord
from train.data.recipe import Recipe

RESPONSES = 1 << 32
"""Sample indices of conversations begin here; those of self-written first turns at 0. None is used twice."""


@dataclass(frozen=True)
class Opening:
    """How a conversation begins. later: further user turns that are given; num_written: tokens of a self-written one.

    is_given: whether the turns come from a record, so that the target writes none of its own.
    """

    prompt: str
    later: tuple[str, ...]
    num_written: int
    is_given: bool


@dataclass(frozen=True)
class _UserTurn:
    """A further user turn, or, in `note`, why there is none ("" where the record simply has no more)."""

    text: str
    num_written: int
    note: str


def open_slot(
    chat: ChatFormat, recipe: Recipe, index: int, record: PromptRecord | None
) -> Generator[Request, Completion, Opening | Lost]:
    """The slot's first user turn: the record's, or one that the target writes."""
    if record is not None:
        return Opening(record.turns[0], record.turns[1:], num_written=0, is_given=True)
    first = chat.token_ids(recipe.first_words(index))
    completion = yield _self_written(recipe, index, chat.user_prefix_ids() + first, sample_index=index)
    text, num_written = _said(chat, completion, first), len(completion.token_ids)
    if not text:
        return Lost(index, "prompt did not end" if not completion.is_ended else "prompt is empty", num_written)
    return Opening(text, (), num_written, is_given=False)


def converse(
    chat: ChatFormat, recipe: Recipe, index: int, rank: int, opening: Opening
) -> Generator[Request, Completion, Kept | Lost]:
    """The slot's conversation, from the answer to its first user turn on; rank: its number among those kept.

    Where it cannot be continued it ends early, with a note.
    """
    messages: list[Message] = [{"role": "user", "content": opening.prompt}]
    prompt = chat.prompt_ids(messages)
    if len(prompt) + recipe.max_tokens > recipe.context_length:
        return Lost(index, "prompt is too long", opening.num_written)
    temperature, num_prompt_tokens = recipe.temperature(rank, index), opening.num_written
    spans: list[tuple[int, int]] = []
    while True:
        completion = yield Request(
            number=index,
            prompt=prompt,
            max_tokens=recipe.max_tokens,
            temperature=temperature,
            top_p=recipe.top_p,
            sample_index=RESPONSES + index,
            continues_turns=bool(spans),
            stops_loops=recipe.stop_loops,
        )
        answer, note = _answer(recipe, completion)
        tokens = prompt + answer
        spans.append((len(prompt), len(tokens)))
        if note or len(spans) == recipe.num_turns:
            break
        messages.append({"role": "assistant", "content": chat.text(completion.token_ids)})
        turn = yield from _further_turn(chat, recipe, index, opening, messages, tokens)
        num_prompt_tokens += turn.num_written
        note = turn.note
        if not turn.text:
            break
        messages.append({"role": "user", "content": turn.text})
        prompt = chat.prompt_ids(messages)
        note = _why_not_continued(recipe, prompt, tokens, recipe.max_tokens)
        if note:
            break
    conversation = Conversation(np.array(tokens, dtype=np.int32), tuple(spans), temperature, index)
    return Kept(conversation, recipe.split(rank), opening.prompt, num_prompt_tokens, (note,) if note else ())


def _answer(recipe: Recipe, completion: Completion) -> tuple[tuple[int, ...], str]:
    """What is kept of a response, and a note where that does not end as the target would end it."""
    answer = tuple(until_loop(completion.token_ids)) if recipe.stop_loops else completion.token_ids
    if recipe.stop_loops and is_looping(answer):
        return answer, "response loops"
    return answer, "" if completion.is_ended else "response cut"


def _further_turn(
    chat: ChatFormat,
    recipe: Recipe,
    index: int,
    opening: Opening,
    messages: list[Message],
    tokens: tuple[int, ...],
) -> Generator[Request, Completion, _UserTurn]:
    """The user turn that follows `messages`, which are served as `tokens`."""
    if opening.is_given:
        number = len(messages) // 2 - 1
        return _UserTurn(opening.later[number] if number < len(opening.later) else "", 0, "")
    prefix = chat.user_prefix_ids(messages)
    budget = max(recipe.self_written.max_tokens, recipe.max_tokens)  # a turn that leaves no room to answer is none
    note = _why_not_continued(recipe, prefix, tokens, budget)
    if note:
        return _UserTurn("", 0, note)
    completion = yield _self_written(recipe, index, prefix, sample_index=RESPONSES + index, continues_turns=True)
    text = _said(chat, completion)
    return _UserTurn(text, len(completion.token_ids), "" if text else "no further prompt")


def _why_not_continued(recipe: Recipe, prompt: tuple[int, ...], tokens: tuple[int, ...], max_tokens: int) -> str:
    """Why a prompt, and up to `max_tokens` behind it, cannot follow `tokens`; "" where it can.

    The target sees a conversation as the template writes it anew for each turn. Where its earlier turns are then other
    tokens than those that were sampled, what was learnt from the sampled ones would not be what is served.
    """
    if prompt[: len(tokens)] != tokens:
        return "turns re-rendered"
    return "context full" if len(prompt) + max_tokens > recipe.context_length else ""


def _self_written(
    recipe: Recipe, index: int, prefix: tuple[int, ...], *, sample_index: int, continues_turns: bool = False
) -> Request:
    rule = recipe.self_written
    return Request(index, prefix, rule.max_tokens, rule.temperature, rule.top_p, sample_index, continues_turns)


def _said(chat: ChatFormat, completion: Completion, first: tuple[int, ...] = ()) -> str:
    """A self-written user turn as its user would have typed it, from its `first` tokens on.

    "" where it did not end or the target added nothing.
    """
    written = completion.token_ids[:-1]
    says_something = completion.is_ended and chat.text(written).strip()
    return chat.text(first + written).strip() if says_something else ""
