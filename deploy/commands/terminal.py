"""What commands write: streamed text, and the line of counts and times after it."""

from __future__ import annotations

import sys

from deploy.runtime.generation import Generation


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
