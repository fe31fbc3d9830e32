"""Continuous batching: requests come in at any time, as many are in flight as there are sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from deploy.runtime.backend import Backend
from deploy.runtime.drafters.base import Drafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.generation import Generation, Request, Stream, go_back, step


class Scheduler:
    """Answers requests in the order of their submission, all that are in flight by one forward a token.

    An answer does not depend on which others are in flight: a row's result is its own (docs/numerics.md). What a
    prompt shares with the text that a free sequence's cache still holds (a system prompt, earlier turns) is not
    computed again. sequences: of backend and drafter, used by nobody else; reset when all requests are answered.
    drafter: for `backend`; by default nobody drafts.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        sequences: Sequence[int],
        eos: frozenset[int],
        drafter: Drafter | None = None,
    ) -> None:
        self._backend, self._tokenizer, self._eos = backend, tokenizer, eos
        self._drafter: Drafter = NoDrafter() if drafter is None else drafter
        self._waiting: deque[tuple[int, Request]] = deque()
        self._active: dict[int, Stream] = {}
        self._free: dict[int, list[int]] = {sequence: [] for sequence in sequences}  # sequence → tokens in its cache
        self._num_submitted = 0

    def submit(self, request: Request, *, is_next: bool = False) -> int:
        """Queue a request, at the front where `is_next`; the number under which its answer comes."""
        number = self._num_submitted
        self._num_submitted += 1
        if is_next:
            self._waiting.appendleft((number, request))
        else:
            self._waiting.append((number, request))
        return number

    def answers(self) -> Iterator[tuple[int, Generation]]:
        """(number, answer) as they end, until no request is left; requests submitted meanwhile are answered too."""
        try:
            while self._waiting or self._active:
                while self._waiting and self._free:
                    self._begin(*self._waiting.popleft())
                step(self._backend, self._drafter, list(self._active.values()), self._eos)
                ended = [number for number, stream in self._active.items() if stream.finish_reason]
                yield from [(number, self._end(number)) for number in ended]  # all have ended before one is handed out
        finally:
            self._abandon()

    def _begin(self, number: int, request: Request) -> None:
        """Start a request on the free sequence whose cache begins most like its prompt."""
        needed = request.prompt[:-1]  # the last token is run to get what follows it
        shared = {sequence: shared_length(cached, needed) for sequence, cached in self._free.items()}
        sequence = max(shared, key=shared.__getitem__)
        num_shared = go_back(self._backend, self._drafter, sequence, shared[sequence])
        self._active[number] = Stream(request, sequence, self._tokenizer, num_shared)
        del self._free[sequence]

    def _end(self, number: int) -> Generation:
        stream = self._active.pop(number)
        self._free[stream.sequence] = stream.path[: stream.num_kept]
        return stream.result()

    def _abandon(self) -> None:
        """Forget every request and empty the caches."""
        self._free |= {stream.sequence: [] for stream in self._active.values()}
        self._waiting.clear()
        self._active.clear()
        for sequence in self._free:
            self._backend.reset(sequence)
            self._drafter.reset(sequence)
            self._free[sequence] = []


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
