"""What commands write: streamed text, and the line of counts and times after it."""

from __future__ import annotations

import sys

from deploy.runtime.generation import Generation
from deploy.runtime.measure import after_prompts
from deploy.runtime.modes import Mode


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def stats_line(result: Generation) -> str:
    count = len(result.token_ids)
    decoded = count - 1  # the first one comes out of the prefill
    rate = f", {decoded / result.decode_seconds:.2f} tokens/s" if decoded else ""
    cached = f" ({result.num_cached_tokens} of them cached)" if result.num_cached_tokens else ""
    return (
        f"prompt {result.num_prompt_tokens} tokens{cached} in {result.prefill_seconds:.2f} s; "
        f"answer {count} tokens in {result.decode_seconds:.2f} s{rate}; ended by {result.finish_reason}"
    )


def speculation_line(mode: Mode, result: Generation) -> str:
    """What the drafts came to, after the forward that read the prompt."""
    counts = after_prompts(result.speculation, 1)
    shares = " / ".join(f"{share:.2f}" for share in counts.acceptance_by_position) or "nothing drafted"
    return (
        f"mode {mode}: {counts.rounds} rounds, τ {counts.tau:.2f}; acceptance by position {shares}; "
        f"{counts.draft_seconds:.2f} s in drafts, {counts.verify_seconds:.2f} s in verification"
    )
