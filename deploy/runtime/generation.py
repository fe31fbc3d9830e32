"""The decoding loop: any number of requests in flight, one forward for all of them, text out as it becomes certain.

A round is a draft for each request, one forward that verifies them all, and what it makes certain. Plain decoding is
the same loop with a drafter that proposes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from tokenizers import Tokenizer

from deploy.runtime.backend import Backend
from deploy.runtime.drafters.base import Drafter, can_propose
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.speculation import Speculation
from deploy.runtime.text import IncrementalDecoder, StopFilter, whole_text
from deploy.runtime.tree import Draft
from deploy.runtime.verify import Job, Verified, verify

FinishReason = Literal["eos", "stop", "length"]
ROWS_PER_CALL = 512
"""Prompts are read in parts of this many rows, beside the rows of the requests that are being answered."""


@dataclass(frozen=True)
class GenerationOptions:
    """max_tokens: at most this many new tokens. stop: texts that end the answer and are not part of it.

    ends: asked after each token whether the answer, its tokens so far, ends with it.
    """

    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    sample_index: int = 0
    ends: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} is out of range; use 1 or more")
        if isinstance(cast(object, self.stop), str):
            raise ValueError(
                f"stop={self.stop!r} is one text, each of whose characters would end the answer; use a tuple"
            )
        StopFilter(self.stop)  # refuses empty stop strings


@dataclass(frozen=True)
class Generation:
    """An answer. token_ids include the one that ended it; seconds are wall time of the two phases.

    num_cached_tokens: how many of the prompt's tokens an earlier turn had left in the cache. speculation: what the
    drafts came to.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    speculation: Speculation = field(default_factory=Speculation)


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) and how to continue it. on_text: called with each piece of text once it is certain."""

    prompt: Sequence[int]
    options: GenerationOptions
    on_text: Callable[[str], None] | None = None


class _Writer:
    """Tokens in, text out: to `pieces` and to the listener."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], listener: Callable[[str], None] | None) -> None:
        self._decoder, self._filter, self._listener = IncrementalDecoder(tokenizer), StopFilter(stop), listener
        self.pieces: list[str] = []

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self._listener is not None:
                self._listener(piece)

    def write(self, token: int) -> bool:
        """Whether a stop string ends the text here."""
        self._show(self._filter.push(self._decoder.push(token)))
        return self._filter.is_stopped

    def finish(self) -> bool:
        """Show what is held back; whether a stop string appeared in it."""
        self._show(self._filter.push(self._decoder.flush()))
        if not self._filter.is_stopped:
            self._show(self._filter.flush())
        return self._filter.is_stopped


class Stream:
    """One request in flight: its sequence, its tokens so far, and how many of them the cache holds.

    Text is made while tokens come only where someone needs it then: a listener, or a stop string to look for.
    """

    def __init__(self, request: Request, sequence: int, tokenizer: Tokenizer, num_cached: int) -> None:
        self.request, self.sequence = request, sequence
        self.path = list(request.prompt)
        self.num_kept = self.num_reused = num_cached
        self.finish_reason: FinishReason | None = None
        self.speculation = Speculation()
        self._tokenizer = tokenizer
        is_text_needed = bool(request.options.stop) or request.on_text is not None
        self._writer = _Writer(tokenizer, request.options.stop, request.on_text) if is_text_needed else None
        self._num_prompt, self._max_tokens = len(self.path), request.options.max_tokens
        self._start, self._prefilled = time.perf_counter(), 0.0

    @property
    def is_answering(self) -> bool:
        """Whether the prompt has been read: the answer has its first token."""
        return bool(self._prefilled)

    def job(self, drafter: Drafter, num_rows: int) -> Job:
        """The next rows, at most `num_rows` of them the text's: a part of the prompt, or what is left with a draft."""
        pending = self.path[self.num_kept : self.num_kept + num_rows]
        is_part = self.num_kept + len(pending) < len(self.path)
        options, draft = self.request.options, Draft()
        budget = self._num_prompt + self._max_tokens - len(self.path) - 1  # the model adds a token of its own
        if not is_part and budget > 0 and self._prefilled and can_propose(drafter, len(pending)):
            begin = time.perf_counter()
            draft = drafter.propose(self.sequence, self.path, budget, options.sampling, options.sample_index)
            self.speculation.draft_seconds += time.perf_counter() - begin
        return Job(self.sequence, self.num_kept, pending, draft, options.sampling, options.sample_index, is_part)

    def take(self, found: Verified, eos: frozenset[int]) -> int:
        """What a forward made certain; how many tokens of the answer. Those behind its last one are dropped."""
        self.num_kept += len(found.computed)
        before = len(self.path)
        for token in found.tokens:
            self._accept(token, eos)
            if self.finish_reason is not None:
                break
        return len(self.path) - before

    def _accept(self, token: int, eos: frozenset[int]) -> None:
        """The token that follows the path; decides whether the answer ends with it."""
        if not self._prefilled:
            self._prefilled = time.perf_counter()
        self.path.append(token)
        if token in eos:
            self.finish_reason = "eos"
        elif self._writer is not None and self._writer.write(token):
            self.finish_reason = "stop"
            return
        elif self._is_ended():
            self.finish_reason = "stop"
        elif len(self.path) - self._num_prompt == self._max_tokens:
            self.finish_reason = "length"
        if self._writer is not None and self.finish_reason is not None and self._writer.finish():
            self.finish_reason = "stop"

    def _is_ended(self) -> bool:
        """Whether the request wants no more."""
        ends = self.request.options.ends
        return ends is not None and ends(self.path[self._num_prompt :])

    def result(self) -> Generation:
        """The finished answer."""
        assert self.finish_reason is not None
        token_ids = tuple(self.path[self._num_prompt :])
        return Generation(
            text="".join(self._writer.pieces) if self._writer is not None else self._decoded(token_ids),
            token_ids=token_ids,
            finish_reason=self.finish_reason,
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=self.num_reused,
            prefill_seconds=self._prefilled - self._start,
            decode_seconds=time.perf_counter() - self._prefilled,
            speculation=self.speculation,
        )

    def _decoded(self, token_ids: tuple[int, ...]) -> str:
        shown = token_ids[:-1] if self.finish_reason == "eos" else token_ids
        return whole_text(self._tokenizer, shown)


def step(backend: Backend, drafter: Drafter, streams: Sequence[Stream], eos: frozenset[int]) -> None:
    """One round for all `streams` (none finished): each gets one token or more, or a further part of its prompt read.

    A drafter must see every computed token of a stream's sequence: it begins where the stream does.
    """
    jobs: list[Job] = []
    num_rows = 0
    for stream in streams:
        jobs.append(stream.job(drafter, max(ROWS_PER_CALL - num_rows, 1)))
        num_rows += len(jobs[-1].pending) + len(jobs[-1].draft)
    begin = time.perf_counter()
    verified = verify(backend, jobs, drafter.taps)
    seconds = time.perf_counter() - begin
    for stream, job, found in zip(streams, jobs, verified, strict=True):
        drafter.commit(stream.sequence, found.computed, found.features)
        share = seconds / len(streams) if stream.is_answering else 0.0
        num_emitted = stream.take(found, eos)
        if found.tokens:
            stream.speculation.count(job.draft, len(found.tokens) - 1, num_emitted, share)
        if stream.num_kept >= len(stream.path):  # the answer ended within the draft
            stream.num_kept = go_back(backend, drafter, stream.sequence, len(stream.path) - 1)


def go_back(backend: Backend, drafter: Drafter, sequence: int, length: int) -> int:
    """Make model and drafter forget the sequence's tokens from `length` on; how many both can go on from."""
    length = drafter.begin(sequence, length)
    backend.truncate(sequence, length)
    return length
