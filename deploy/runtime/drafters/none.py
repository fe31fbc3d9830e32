"""No drafts: plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.runtime.drafters.base import Float32
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft


class NoDrafter:
    """Drafter (deploy/runtime/drafters/base.py) that never proposes anything."""

    taps = ()

    def begin(self, sequence: int, length: int) -> int:
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        """Nothing to remember."""

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        return Draft()

    def reset(self, sequence: int) -> None:
        """Nothing to forget."""
