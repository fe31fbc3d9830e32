"""What an engine is: requests in, sampled tokens out as they finish."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """Token ids to continue.

    number: the caller's, unique among the requests in flight; comes back with the completion. sample_index: keys the
    noise together with the engine's seed and the position, so that no two samples share theirs. continues_turns:
    earlier turns of the same conversation were just generated, so that an engine which still has them cached should
    take it first. stops_loops: what follows a loop is not wanted (train/data/loops.py); an engine that can stops there.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    sample_index: int
    continues_turns: bool = False
    stops_loops: bool = False


@dataclass(frozen=True)
class Completion:
    """What followed a prompt. is_ended: the model ended it itself, by the last of `token_ids`."""

    number: int
    token_ids: tuple[int, ...]
    is_ended: bool


class Engine(Protocol):
    """Samples from one model.

    Which noise a request gets hangs on the engine's seed, the request's sample_index and the position: turns of one
    conversation share the first two.
    """

    @property
    def capacity(self) -> int:
        """Requests that it works on at a time; more of them should be waiting."""
        ...

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a completion depends on its request alone, bit for bit, whatever else is in flight."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request."""
        ...

    def completions(self) -> Generator[Completion, None, None]:
        """Completions as they finish, until no request is left; requests submitted meanwhile are served too.

        Closing the generator drops what is unfinished. Raises ValueError when the model or server behind it fails for
        good.
        """
        ...
