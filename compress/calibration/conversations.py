"""Conversations that an instruction model writes with itself, as calibration and held-out samples.

The model's chat template gives the frame: its user header is the short prefix after which the model writes a user
turn, and what follows a user turn leads into the answer (Magpie, arXiv 2406.08464).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jinja2

from compress.calibration.generate import Continuation, SamplingRule, Writer, drop_most_perplexing
from deploy.formats.chat import TURN_MARKER, around_user_turn


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around a user turn.

    system: what it puts first when no system message is given ("" for many); before: the user turn's header; after:
    what leads from the user turn to the assistant's first token; first: the token that begins every text, where the
    template writes one ahead of `system`.
    """

    system: str
    before: str
    after: str
    first: str = ""

    @classmethod
    def from_template(
        cls, render: Callable[[list[dict[str, str]]], str], end_tokens: list[str], bos_token: str | None = None
    ) -> "ChatFrame":
        """render: messages → prompt with the generation header; end_tokens: the texts that may close a turn.

        Where a template writes `bos_token` and nothing else ahead of a user turn, it has no header for users.
        """
        start, after = around_user_turn(render)
        if start == bos_token:
            return cls(system="", before="", after=after, first=bos_token)
        try:
            header = around_user_turn(render, [{"role": "system", "content": TURN_MARKER}])[0].split(TURN_MARKER)[1]
        except jinja2.TemplateError:  # some templates refuse a system message; they write none of their own either
            return cls(system="", before=start, after=after)
        for end in end_tokens:
            header = header.removeprefix(end)
        header = header.lstrip("\n")
        if header and start.endswith(header):
            system = start.removesuffix(header)
            # Where turns begin with the bos token too (ChatML with <|im_start|> as bos), it is no separate first token.
            first = bos_token if bos_token and system.startswith(bos_token) and not header.startswith(bos_token) else ""
            return cls(system=system.removeprefix(first), before=header, after=after, first=first)
        return cls(system="", before=start, after=after)


@dataclass(frozen=True)
class ConversationBudget:
    """How many conversations to keep and how long their parts may be, in tokens.

    system_share: share of the samples that keep the template's own system prompt. All are written under it (without
    it, SmolLM2 ends a user turn in 1 of 9 cases, with it in 4 of 5), but a Hessian over samples that all begin alike
    is a poor one.
    drop_share: the most perplexing share that is dropped.
    """

    num_samples: int
    prompt_tokens: int
    response_tokens: int
    system_share: float
    drop_share: float

    @property
    def num_wanted(self) -> int:
        """Conversations to write, those included that are dropped again."""
        return round(self.num_samples / (1 - self.drop_share) + 0.5)

    @property
    def most_tokens(self) -> int:
        """What is written at most where one round of user turns is enough, dropped texts included."""
        return num_begun(self.num_wanted) * self.prompt_tokens + self.num_wanted * self.response_tokens


UNFINISHED_ALLOWANCE, UNFINISHED_EXTRA = 1.3, 6
"""User turns that do not end within `prompt_tokens` are dropped: with 48 a fourth to a third of SmolLM2's, with 128
half of Qwen2.5-Coder's (measured). So more are begun than wanted, and more again until there are enough."""
MOST_BEGUN = 5
"""So many times as many turns as wanted are begun at most."""


def num_begun(num_missing: int) -> int:
    """User turns to begin where so many are wanted."""
    return round(num_missing * UNFINISHED_ALLOWANCE) + UNFINISHED_EXTRA


def write_conversations(
    writer: Writer,
    encode: Callable[[str], list[int]],
    frame: ChatFrame,
    rule: SamplingRule,
    budget: ConversationBudget,
    *,
    seed: int,
) -> list[list[int]]:
    """Token ids of `budget.num_samples` conversations of one user turn and one answer each.

    Raises ValueError when too few user turns end, which means that the chat template does not fit the model, when the
    template has nothing to begin a user turn with, and when the target's context is too short.
    """
    if not frame.before:
        raise ValueError(
            "the target's chat template has no user header (a base model?), so that it cannot write conversations; set"
            " calibrate.chat.num_samples=0 calibrate.chat.num_heldout=0"
        )
    first, system = encode(frame.first) if frame.first else [], encode(frame.system) if frame.system else []
    header, bridge = encode(frame.before), encode(frame.after)
    _check_fits(len(first + system + header + bridge), budget, writer.context_length)
    asked = _user_turns(writer, first + system + header, rule, budget, seed)
    complete = list(asked)
    contexts = {i: first + system + header + _without_end(asked[i], rule.end_ids) + bridge for i in complete}
    answers = writer.continue_texts(contexts, rule, num_tokens=budget.response_tokens, seed=seed)
    kept = drop_most_perplexing(
        [[asked[i], answers[i]] for i in complete], share=budget.drop_share, min_kept=budget.num_samples
    )
    written = [contexts[i] + answers[i].tokens for i in (complete[place] for place in kept)][: budget.num_samples]
    bare_from = len(first) + len(system)
    return [ids if _is_every(budget.system_share, i) else first + ids[bare_from:] for i, ids in enumerate(written)]


def _user_turns(
    writer: Writer, prefix: list[int], rule: SamplingRule, budget: ConversationBudget, seed: int
) -> dict[int, Continuation]:
    """By number, the first `num_wanted` turns that end, or as many as do of `MOST_BEGUN` times as many."""
    ended: dict[int, Continuation] = {}
    begun = 0
    while len(ended) < budget.num_wanted and begun < MOST_BEGUN * budget.num_wanted:
        numbers = range(begun, begun + num_begun(budget.num_wanted - len(ended)))
        begun = numbers.stop
        prompts = dict.fromkeys(numbers, prefix)
        turns = writer.continue_texts(prompts, rule, num_tokens=budget.prompt_tokens, seed=seed, will_go_on=True)
        ended |= {number: turn for number, turn in turns.items() if turn.is_finished and len(turn.tokens) > 1}
    if len(ended) < budget.num_samples:
        raise ValueError(
            f"only {len(ended)} of {begun} self-written user turns ended within"
            f" calibrate.chat.prompt_tokens={budget.prompt_tokens}; raise it, or use calibrate=texts"
        )
    return {number: ended[number] for number in sorted(ended)[: budget.num_wanted]}


def _check_fits(num_framing: int, budget: ConversationBudget, context_length: int) -> None:
    if num_framing + budget.prompt_tokens + budget.response_tokens > context_length:
        raise ValueError(
            f"calibrate.chat.response_tokens={budget.response_tokens} behind a user turn of"
            f" calibrate.chat.prompt_tokens={budget.prompt_tokens} and the chat template's {num_framing} exceeds the"
            f" target's context of {context_length}; lower one of them"
        )


def _is_every(share: float, index: int) -> bool:
    """True for a `share` of all indices, spread evenly."""
    return int((index + 1) * share) > int(index * share)


def _without_end(turn: Continuation, end_ids: frozenset[int]) -> list[int]:
    return turn.tokens[:-1] if turn.tokens and turn.tokens[-1] in end_ids else turn.tokens
