"""What answers say of the way in which they were made: rates, counts of drafts, and where a round's time went."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.session import Session
from deploy.runtime.speculation import Speculation


class Answer(NamedTuple):
    """prompt: its token ids, those of earlier turns included."""

    record: PromptRecord
    prompt: tuple[int, ...]
    result: Generation


def answer_all(
    session: Session,
    records: Iterable[PromptRecord],
    options: GenerationOptions,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Every turn of every record answered in order, each conversation from the start.

    Raises ValueError naming the record whose conversation does not fit the context.
    """
    answers = []
    for record in records:
        messages: list[dict[str, str]] = []
        for turn in record.turns or (None,):
            if turn is not None:
                messages.append({"role": "user", "content": turn})
            prompt = record.token_ids if turn is None else tuple(session.encode_chat(messages))
            try:
                result = session.generate(prompt, options)
            except ValueError as error:
                raise ValueError(f"prompt {record.identity!r}: {error}") from error
            messages.append({"role": "assistant", "content": result.text})
            answers.append(Answer(record, prompt, result))
            on_answer()
    return answers


def after_prompts(counts: Speculation, num_answers: int) -> Speculation:
    """The rounds behind the first one of each answer, which reads the prompt and for which nothing is drafted."""
    return replace(counts, rounds=counts.rounds - num_answers, emitted=counts.emitted - num_answers)


def survival(counts: Speculation) -> tuple[float, ...]:
    """Share of rounds whose drafts were accepted up to each place."""
    return tuple(accepted / counts.rounds for accepted in counts.accepted) if counts.rounds else ()


def speculation_json(counts: Speculation) -> dict[str, Any]:
    """What drafts came to, as `generate --json` tells it."""
    return {
        "rounds": counts.rounds,
        **acceptance_json(counts),
        "draft_seconds": round(counts.draft_seconds, 4),
        "verify_seconds": round(counts.verify_seconds, 4),
    }


def acceptance_json(counts: Speculation) -> dict[str, Any]:
    """Ratios that do not depend on how many answers there were."""
    rounds = max(counts.rounds, 1)
    return {
        "tau": round(counts.tau, 4),
        "acceptance_by_position": [round(share, 4) for share in counts.acceptance_by_position],
        "survival": [round(share, 4) for share in survival(counts)],
        "nodes_per_round": round(counts.drafted / rounds, 4),
        "levels_per_round": round(counts.levels / rounds, 4),
    }


def counts_of(passes: Sequence[Sequence[Generation]]) -> Speculation:
    """All drafts of all passes, the forwards that read prompts left out."""
    results = [result for one in passes for result in one]
    return after_prompts(Speculation.total(result.speculation for result in results), len(results))


def rates(passes: Sequence[Sequence[Generation]]) -> dict[str, Any]:
    """passes: the same answers in each, one after another; an answer's times are the medians over the passes.

    decode_tok_s: tokens after the first of each answer, per second of decoding. e2e_tok_s: all tokens per second, the
    reading of prompts by every model included (the drafting ones read them in the first round). ttft_ms: median time
    to the first token. rounds, tokens: of one pass (its mean, where passes differ).
    """
    answers = list(zip(*passes, strict=True))
    decode = [statistics.median(result.decode_seconds for result in same) for same in answers]
    prefill = [statistics.median(result.prefill_seconds for result in same) for same in answers]
    tokens = sum(len(result.token_ids) for result in passes[0])
    decoded = tokens - len(answers)
    num_rounds = sum(result.speculation.rounds for one in passes for result in one) / len(passes)
    return {
        "decode_tok_s": round(decoded / sum(decode), 2) if decoded else None,
        "e2e_tok_s": round(tokens / (sum(decode) + sum(prefill)), 2),
        "ttft_ms": round(statistics.median(prefill) * 1e3, 2),
        "rounds": round(num_rounds),
        "tokens": tokens,
    }


def round_parts(passes: Sequence[Sequence[Generation]]) -> dict[str, float] | None:
    """Mean milliseconds of a round by part: the draft, the forward that verifies it, and all else (text, copying
    states to a head, the loop itself); None where no round followed a prompt's."""
    counts = counts_of(passes)
    if not counts.rounds:
        return None
    seconds = sum(result.decode_seconds for one in passes for result in one)
    other = max(seconds - counts.draft_seconds - counts.verify_seconds, 0.0)
    parts = {"draft": counts.draft_seconds, "verify": counts.verify_seconds, "other": other}
    return {name: round(1e3 * spent / counts.rounds, 4) for name, spent in parts.items()}


def count_identical(passes: Sequence[Sequence[Generation]], plain: Sequence[Generation]) -> dict[str, int]:
    """How many answers have the tokens of the target alone."""
    pairs = [(result, expected) for one in passes for result, expected in zip(one, plain, strict=True)]
    return {"same": sum(a.token_ids == b.token_ids for a, b in pairs), "total": len(pairs)}
