"""What a bundle does per second on a set of prompts, and what a forward costs by its number of rows."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from deploy.runtime.backend import SEQUENCE_END, Backend, Row
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

ROW_COUNTS = (1, 2, 4, 6, 8, 12, 16)
CONTEXT, REPEATS = 128, 15


def time_rows(backend: Backend) -> dict[str, float]:
    """Number of rows → median milliseconds of a forward that continues 128 tokens by a chain of that many.

    Where the model's context is shorter, it continues as many as leave room for the longest chain.
    """
    sequence, greedy, shape = 0, SamplingParams(), backend.shape
    context = max(1, min(CONTEXT, shape.context_length - max(ROW_COUNTS)))
    backend.reset(sequence)
    backend.forward(_chain(0, context, shape.vocab_size), logit_rows=[])
    backend.keep(sequence, range(context))
    found = {}
    for count in ROW_COUNTS:
        if context + count > shape.context_length:
            break
        rows, times = _chain(context, count, shape.vocab_size), []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            backend.forward_tokens(rows, greedy)
            times.append((time.perf_counter() - begin) * 1e3)
        found[str(count)] = round(statistics.median(times), 4)
    backend.reset(sequence)
    return found


def answer_all(
    session: Session,
    records: Iterable[PromptRecord],
    options: GenerationOptions,
    on_answer: Callable[[], None] = lambda: None,
) -> list[tuple[PromptRecord, Generation]]:
    """Every turn of every record answered in order, each conversation from the start.

    Raises ValueError naming the record whose conversation does not fit the context.
    """
    answers = []
    for record in records:
        messages: list[dict[str, str]] = []
        for turn in record.turns:
            messages.append({"role": "user", "content": turn})
            try:
                result = session.generate(session.encode_chat(messages), options)
            except ValueError as error:
                raise ValueError(f"prompt {record.identity!r}: {error}") from error
            messages.append({"role": "assistant", "content": result.text})
            answers.append((record, result))
            on_answer()
    return answers


def summarize(answers: Sequence[tuple[PromptRecord, Generation]]) -> dict[str, Any]:
    """Rates over all answers, and by category.

    decode_tok_s: tokens after the first of each answer, per second of decoding; e2e_tok_s: all tokens per second,
    prompts' prefill included; ttft_ms: median time to the first token.
    """
    whole = _rates([result for _record, result in answers])
    categories = dict.fromkeys(record.category for record, _result in answers)
    by_category = {
        category: _rates([result for record, result in answers if record.category == category])
        for category in categories
    }
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {**whole, "peak_rss_mb": round(peak_mb, 1), "by_category": by_category}


def _rates(results: Sequence[Generation]) -> dict[str, Any]:
    tokens = sum(len(result.token_ids) for result in results)
    decode, prefill = (
        sum(getattr(result, f"{phase}_seconds") for result in results) for phase in ("decode", "prefill")
    )
    decoded = tokens - len(results)
    return {
        "decode_tok_s": round(decoded / decode, 2) if decoded else None,
        "e2e_tok_s": round(tokens / (decode + prefill), 2),
        "ttft_ms": round(statistics.median(result.prefill_seconds for result in results) * 1e3, 2),
        "rounds": tokens,
        "tokens": tokens,
    }


def _chain(start: int, count: int, vocab_size: int) -> list[Row]:
    return [Row((100 + i) % vocab_size, start + i, 0, i - 1 if i else SEQUENCE_END) for i in range(count)]
