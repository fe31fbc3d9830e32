"""What a drafter is, and what a model must be able to do to draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits

Float32 = npt.NDArray[np.float32]


class Drafter(Protocol):
    """Proposes what may follow a text. Nothing that it does can change an answer, only how fast it comes.

    A sequence's text is `path`. The level above computes its tokens in order, all but the last, and tells of them by
    `commit`; the last is certain too, but not yet computed, and a draft follows it.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the level above whose states `commit` needs, ascending; often none."""
        ...

    def begin(self, sequence: int, length: int) -> int:
        """Forget the sequence's committed tokens from `length` on; how many it can go on from, at most `length`.

        The level above computes the others again, so that it can commit them again. Asked again, one that needs a
        token's state may go back by one more.
        """
        ...

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """The next computed tokens of the text. features: float32 [len(tokens), len(taps) · hidden], the states of
        `taps` side by side; None where there are no taps."""
        ...

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        """A draft of at most `budget` levels that follows `path`, of which all but the last token are committed.

        sampling, sample_index: the request's, so that the draft shares the target's noise.
        """
        ...

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        ...


def can_propose(drafter: Drafter, num_pending: int) -> bool:
    """Whether it can draft behind a text whose last `num_pending` tokens are not computed: one that reads states needs
    those of all tokens but the last."""
    return num_pending == 1 or not drafter.taps


@runtime_checkable
class DraftModel(Protocol):
    """A model that drafts natively: a causal language model, or an EAGLE head over another model's states.

    Its cache holds one row per token of the text that it has read. A language model's row t reads token t; a head's
    row t reads the state of token t and token t + 1, so it has one row fewer than the text has tokens.
    """

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the model above whose states its rows read; () for a language model."""
        ...

    def draft(
        self,
        sequence: int,
        tokens: Sequence[int],
        features: Float32 | None,
        limits: TreeLimits,
        sampling: SamplingParams,
        sample_index: int = 0,
    ) -> Draft:
        """Read the text's next tokens, keep them in the cache, and draft what follows the last of them.

        features: float32 [len(tokens), len(feature_layers) · hidden], the states of the tokens before each of
        `tokens`; None for a language model. Drops all rows that were not kept. Raises ValueError for what does not fit,
        and when logits are not finite; the cache is then as it was.
        """
        ...

    def length(self, sequence: int) -> int:
        """Rows in the sequence's cache."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget rows from `length` on. Raises ValueError when there are fewer."""
        ...

    def reset(self, sequence: int) -> None:
        """Forget the sequence."""
        ...
