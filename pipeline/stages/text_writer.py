"""The target as it stands, writing calibration texts: its plain directory on the CPU runtime.

The runtime holds plain matrices in 8 bits (docs/numerics.md, *Weights*), so that the text is the target's own but for
a KL divergence of some thousandths, and it gives the same bits on every machine: so do the texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.calibration.generate import Continuation, SamplingRule
from deploy.runtime.backend import NO_TOKEN, SEQUENCE_END, Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import ROWS_PER_CALL
from deploy.runtime.sampling import SamplingParams, not_finite
from deploy.runtime.scheduler import shared_length

NUM_SEQUENCES = 64
"""Texts written at a time: more hold more keys and values, and no text depends on it."""


@dataclass
class _Text:
    """One that is being written. path: all its tokens, of which the cache lacks the last."""

    number: int
    path: list[int]
    found: Continuation


class RuntimeWriter:
    """Writer (see compress/calibration/generate.py) by a model that nobody else uses meanwhile.

    on_tokens: called with the number of tokens as they are written, and of those that a text which ends early leaves
    of its budget.
    """

    def __init__(self, backend: CpuBackend, on_tokens: Callable[[int], None]) -> None:
        self._backend, self._on_tokens = backend, on_tokens
        self._cached: dict[int, list[int]] = {}  # number of a text that will go on → what its sequence's cache holds

    @property
    def context_length(self) -> int:
        """As of a Writer."""
        return self._backend.shape.context_length

    def continue_texts(
        self,
        prompts: Mapping[int, Sequence[int]],
        rule: SamplingRule,
        *,
        num_tokens: int,
        seed: int,
        will_go_on: bool = False,
    ) -> dict[int, Continuation]:
        """As of a Writer. Raises ValueError where the model's logits are not finite, or its context is too short."""
        self._check_length(max(map(len, prompts.values()), default=0), num_tokens)
        for number in self._cached.keys() - prompts.keys():
            del self._cached[number]
            self._backend.reset(number)
        sampling = SamplingParams(rule.temperature, top_p=rule.top_p, seed=seed)
        waiting = deque(_Text(number, list(prompt), Continuation()) for number, prompt in prompts.items())
        results = {text.number: text.found for text in waiting}
        writing: list[_Text] = []
        while waiting or writing:
            begun = [waiting.popleft() for _ in range(min(NUM_SEQUENCES - len(writing), len(waiting)))]
            self._read(begun)
            writing += begun
            self._write(writing, sampling, rule.end_ids)
            num_done = len(writing)
            for text in [text for text in writing if text.found.is_finished or len(text.found.tokens) == num_tokens]:
                writing.remove(text)
                num_done += num_tokens - len(text.found.tokens)
                if will_go_on:
                    self._cached[text.number] = text.path[:-1]
                else:
                    self._backend.reset(text.number)
            self._on_tokens(num_done)
        return results

    def _check_length(self, longest: int, num_tokens: int) -> None:
        if longest + num_tokens > self.context_length:
            raise ValueError(
                f"{num_tokens} tokens behind a prompt of {longest} exceed the target's context of {self.context_length}"
            )

    def _read(self, texts: Sequence[_Text]) -> None:
        """Into the cache: every prompt but for its last token, or what an earlier text left of it to be read."""
        rows: list[Row] = []
        kept: dict[int, list[int]] = {}
        for text in texts:
            shared = shared_length(self._cached.pop(text.number, []), text.path[:-1])
            self._backend.truncate(text.number, shared)
            parent = SEQUENCE_END
            for position in range(shared, len(text.path) - 1):
                if len(rows) == ROWS_PER_CALL:
                    self._compute(rows, kept)
                    rows, kept, parent = [], {}, SEQUENCE_END
                rows.append(Row(text.path[position], position, text.number, parent))
                parent = len(rows) - 1
                kept.setdefault(text.number, []).append(parent)
        self._compute(rows, kept)

    def _compute(self, rows: list[Row], kept: Mapping[int, list[int]]) -> None:
        if rows:
            self._backend.forward(rows, logit_rows=[])
        for number, path in kept.items():
            self._backend.keep(number, path)

    def _write(self, texts: Sequence[_Text], sampling: SamplingParams, end_ids: frozenset[int]) -> None:
        """One more token for each text."""
        rows = [Row(text.path[-1], len(text.path) - 1, text.number) for text in texts]
        logits = np.empty((len(rows), self._backend.shape.vocab_size), dtype=np.float32)
        numbers = [text.number for text in texts]
        tokens = self._backend.forward_tokens(rows, sampling, sample_index=numbers, logits=logits).tokens
        if NO_TOKEN in tokens:
            raise ValueError(not_finite(len(texts[tokens.index(NO_TOKEN)].path)))
        for place, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            self._backend.keep(text.number, [place])
            text.path.append(token)
            text.found.tokens.append(token)
            text.found.is_finished = token in end_ids
            text.found.log_probs.append(_log_prob(logits[place], token))


def _log_prob(logits: npt.NDArray[np.float32], token: int) -> float:
    """Of a token, given a row of logits; so precise that which texts are dropped is the same on every machine."""
    shifted = (logits - logits.max()).astype(np.float64)
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
