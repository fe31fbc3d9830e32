"""The hierarchy of "Speculative Decoding Meets Quantization" (arXiv 2505.22179) as one drafter.

An inner drafter proposes for an intermediate model, which verifies the proposals as the target does (by the same
function) and so writes tokens of its own; these are the draft for the level above. Written until it holds
`min_draft_length` tokens, it is a sequence: a quantized target's rows are cheap, but not a whole tree's.

Cascades compose: the inner drafter may be an EAGLE head, a lookup, or another cascade.
"""

from __future__ import annotations

from collections.abc import Sequence

from deploy.runtime.backend import Backend
from deploy.runtime.drafters.base import Drafter, Float32, can_propose
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft
from deploy.runtime.verify import Job, verify

_ROWS_PER_CALL = 512


class Cascade:
    """Drafter (deploy/runtime/drafters/base.py) whose tokens are an intermediate model's.

    After a draft that was accepted whole the intermediate first reads the last two tokens, which it has not computed;
    after one that was accepted in part it goes back to where the texts agree. An inner drafter that needs the last
    token's state gets it then by that token's being computed again: one row more in the next forward.
    """

    taps = ()

    def __init__(self, model: Backend, inner: Drafter, *, min_draft_length: int = 6) -> None:
        if min_draft_length < 1:
            raise ValueError(f"min_draft_length={min_draft_length} is out of range; use 1 or more")
        self.model, self.inner, self.min_draft_length = model, inner, min_draft_length
        self.rounds, self.emitted = 0, 0
        self._texts: dict[int, list[int]] = {}  # sequence → the tokens in the model's cache

    def begin(self, sequence: int, length: int) -> int:
        self._go_back(sequence, min(length, len(self._texts.get(sequence, ()))))
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """Nothing: `propose` reads the text."""

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        text, begin = list(path), len(path)
        wanted = begin + min(budget, self.min_draft_length)
        try:
            self._go_back(sequence, self._agreed(sequence, path))
            while len(text) < wanted:
                text += self._round(sequence, text, begin + budget - len(text), sampling, sample_index)
        except BaseException:  # an interrupt may fall between the intermediate and its drafter
            self.reset(sequence)
            raise
        return Draft.chain(text[begin : begin + budget])

    def _round(
        self, sequence: int, text: list[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> tuple[int, ...]:
        """The intermediate's next tokens; none where it has only read a part of a long text."""
        known = self._texts.setdefault(sequence, [])
        unread = text[len(known) :]
        pending = unread[:_ROWS_PER_CALL]
        is_part = len(pending) < len(unread)
        draft = Draft()
        if not is_part and budget > 1 and can_propose(self.inner, len(pending)):
            draft = self.inner.propose(sequence, text, budget - 1, sampling, sample_index)
        job = Job(sequence, len(known), pending, draft, sampling, sample_index, is_read_only=is_part)
        (found,) = verify(self.model, [job], self.inner.taps)
        known.extend(found.computed)
        self.inner.commit(sequence, found.computed, found.features)
        self.rounds += not is_part
        self.emitted += len(found.tokens)
        return found.tokens

    def _agreed(self, sequence: int, path: Sequence[int]) -> int:
        """How much of the model's cache holds the text, its last token left out: that one is to be computed."""
        known = self._texts.get(sequence, [])
        most = min(len(known), len(path) - 1)
        return next((index for index in range(most) if known[index] != path[index]), most)

    def _go_back(self, sequence: int, length: int) -> None:
        known = self._texts.get(sequence)
        if known is None or len(known) == length:
            return
        length = self.inner.begin(sequence, length)
        self.model.truncate(sequence, length)
        del known[length:]

    def reset(self, sequence: int) -> None:
        self.model.reset(sequence)
        self.inner.reset(sequence)
        self._texts.pop(sequence, None)
