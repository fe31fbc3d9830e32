"""Drafts of a model: a small language model, or an EAGLE head over the states of the model that it drafts for.

Whether they are a sequence, EAGLE-2's tree or OPT-Tree's is a matter of `TreeLimits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deploy.runtime.drafters.base import DraftModel, Float32
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits

_READ_AHEAD = 128
"""A head reads states that wait for it in parts of this many, so that a long prompt's do not pile up."""


class LanguageModelDrafter:
    """Drafter (deploy/runtime/drafters/base.py) over a small language model of the same vocabulary.

    It reads the text itself; of the model above it needs nothing.
    """

    taps = ()

    def __init__(self, model: DraftModel, limits: TreeLimits) -> None:
        self.model, self.limits = model, limits

    def begin(self, sequence: int, length: int) -> int:
        if self.model.length(sequence) > length:
            self.model.truncate(sequence, length)
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """Nothing: `propose` reads the text."""

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        unread = path[self.model.length(sequence) :]
        return self.model.draft(sequence, unread, None, within(self.limits, budget), sampling, sample_index)

    def reset(self, sequence: int) -> None:
        self.model.reset(sequence)


@dataclass
class _Waiting:
    """Committed tokens whose states the head has not read: the last one's successor is not known yet."""

    tokens: list[int]
    features: list[Float32]

    def __len__(self) -> int:
        return len(self.tokens)


class EagleDrafter:
    """Drafter (deploy/runtime/drafters/base.py) over an EAGLE head.

    The head's row t reads the state of token t and the embedding of token t + 1, so a state waits until the token
    after its own is known.
    """

    def __init__(self, model: DraftModel, limits: TreeLimits) -> None:
        self.model, self.limits = model, limits
        self._waiting: dict[int, _Waiting] = {}

    @property
    def taps(self) -> tuple[int, ...]:
        return self.model.feature_layers

    def begin(self, sequence: int, length: int) -> int:
        """Row t also stands for token t + 1, and a state that was read is not kept: so up to two tokens fewer."""
        waiting = self._waiting.get(sequence)
        num_read = self.model.length(sequence)
        num_committed = num_read + (len(waiting) if waiting else 0)
        num_rows = min(num_read, max(length - 1, 0))
        if num_rows < num_read or length <= num_read:  # then nothing that waits is wanted
            self.model.truncate(sequence, num_rows)
            self._waiting.pop(sequence, None)
            return num_rows
        if waiting is None or length >= num_committed:
            return num_committed
        features = np.concatenate(waiting.features)[: length - num_read]
        self._waiting[sequence] = _Waiting(waiting.tokens[: length - num_read], [features])
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        assert features is not None
        waiting = self._waiting.setdefault(sequence, _Waiting([], []))
        for begin in range(0, len(tokens), _READ_AHEAD):
            waiting.tokens.extend(tokens[begin : begin + _READ_AHEAD])
            waiting.features.append(features[begin : begin + _READ_AHEAD])
            if len(waiting) > _READ_AHEAD:
                states = np.concatenate(waiting.features)
                self._read(sequence, waiting.tokens[1 : _READ_AHEAD + 1], states[:_READ_AHEAD])
                # A copy: what was read is not to be kept for what was not.
                waiting.tokens, waiting.features = waiting.tokens[_READ_AHEAD:], [states[_READ_AHEAD:].copy()]

    def _read(self, sequence: int, tokens: Sequence[int], features: Float32) -> None:
        self.model.draft(sequence, tokens, features, TreeLimits(depth=1, num_nodes=1), SamplingParams())

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        waiting = self._waiting.pop(sequence)
        assert self.model.length(sequence) + len(waiting) == len(path) - 1
        features = waiting.features[0] if len(waiting.features) == 1 else np.concatenate(waiting.features)
        unread = [*waiting.tokens[1:], path[-1]]
        return self.model.draft(sequence, unread, features, within(self.limits, budget), sampling, sample_index)

    def reset(self, sequence: int) -> None:
        self.model.reset(sequence)
        self._waiting.pop(sequence, None)


def within(limits: TreeLimits, budget: int) -> TreeLimits:
    """The limits with no more levels than `budget`, and a chain's nodes no more than its levels."""
    depth = min(limits.depth, budget)
    if depth == limits.depth:
        return limits
    num_nodes = min(limits.num_nodes, depth) if limits.width == 1 else limits.num_nodes
    return replace(limits, depth=depth, num_nodes=num_nodes)
