"""The one way in which drafted tokens become text, whoever drafted them: sample, then match.

The model computes the text's pending tokens and a draft behind them in one forward, chooses its own token after the
last pending one and after every drafted one, and follows its choices through the draft for as long as it finds them
there. What comes out is what choosing one token at a time would have given, bit for bit: a row's result depends on its
own path alone, and noise on position and token (docs/numerics.md). Plain decoding is the case of an empty draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.runtime.backend import NO_TOKEN, SEQUENCE_END, Backend, Row
from deploy.runtime.sampling import SamplingParams, not_finite
from deploy.runtime.tree import ROOT, Draft


@dataclass(frozen=True)
class Job:
    """One sequence's share of a forward.

    start: tokens in its cache. pending: the text's next tokens, one or more. draft: what may follow them. is_read_only:
    more of a prompt follows, so nothing is chosen.
    """

    sequence: int
    start: int
    pending: Sequence[int]
    draft: Draft
    sampling: SamplingParams
    sample_index: int
    is_read_only: bool = False


@dataclass(frozen=True)
class Verified:
    """What came of a job. tokens: the model's own, that follow the pending ones: accepted drafts, then one more.

    computed: tokens now added to the cache, the pending ones and the accepted drafts. features: float32
    [len(computed), taps · hidden], their states side by side; None where no taps were asked for.
    """

    tokens: tuple[int, ...]
    computed: tuple[int, ...]
    features: npt.NDArray[np.float32] | None


def verify(backend: Backend, jobs: Sequence[Job], taps: Sequence[int] = ()) -> list[Verified]:
    """One forward for all jobs; their caches grow by what is certain.

    Raises ValueError as `forward_tokens` does, and where the model has no token for a text: its logits are not finite.
    """
    rows: list[Row] = []
    asked: list[int] = []
    begins: list[int] = []
    for job in jobs:
        begins.append(len(rows))
        _append_rows(rows, job)
        if not job.is_read_only:
            asked.extend(range(begins[-1] + len(job.pending) - 1, len(rows)))
    how = [job.sampling for job in jobs if not job.is_read_only for _ in range(1 + len(job.draft))]
    which = [job.sample_index for job in jobs if not job.is_read_only for _ in range(1 + len(job.draft))]
    forward = backend.forward_tokens(rows, how, taps, token_rows=asked, sample_index=which)
    chosen = dict(zip(asked, forward.tokens, strict=True))
    return [_take(backend, job, begin, chosen, forward.taps) for job, begin in zip(jobs, begins, strict=True)]


def _append_rows(rows: list[Row], job: Job) -> None:
    begin, start, sequence = len(rows), job.start, job.sequence
    for offset, token in enumerate(job.pending):
        rows.append(Row(token, start + offset, sequence, begin + offset - 1 if offset else SEQUENCE_END))
    last = len(rows) - 1
    for token, parent in zip(job.draft.tokens, job.draft.parents, strict=True):
        above = last if parent == ROOT else last + 1 + parent
        rows.append(Row(token, rows[above].position + 1, sequence, above))


def _take(
    backend: Backend, job: Job, begin: int, chosen: dict[int, int], taps: dict[int, npt.NDArray[np.float32]]
) -> Verified:
    """Follow the choices through the draft, and keep the rows on the way."""
    kept = list(range(begin, begin + len(job.pending)))
    computed, tokens = list(job.pending), []

    def take_token() -> None:
        if chosen[kept[-1]] == NO_TOKEN:
            raise ValueError(not_finite(job.start + len(computed)))
        tokens.append(chosen[kept[-1]])

    if not job.is_read_only:
        first, node = begin + len(job.pending), ROOT
        take_token()
        while (child := job.draft.child(node, tokens[-1])) is not None:
            node = child
            kept.append(first + node)
            computed.append(job.draft.tokens[node])
            take_token()
    backend.keep(job.sequence, kept)
    return Verified(tuple(tokens), tuple(computed), _side_by_side(taps, kept) if taps else None)


def _side_by_side(taps: dict[int, npt.NDArray[np.float32]], kept: list[int]) -> npt.NDArray[np.float32]:
    """The kept rows' states, layer by layer into one array: of a long prompt they are too many to copy twice."""
    states = np.empty((len(kept), len(taps), next(iter(taps.values())).shape[1]), np.float32)
    for column, layer in enumerate(sorted(taps)):
        states[:, column] = taps[layer][kept]
    return states.reshape(len(kept), -1)
