"""What drafts came to: the counts from which τ, acceptance and a round's time are told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from deploy.runtime.tree import ROOT, Draft


@dataclass
class Speculation:
    """Counts of one answer, or of several together.

    rounds: forwards of the target that gave tokens. emitted: tokens that they gave. drafted: nodes of all drafts;
    levels: their depths.
    reached[j]: rounds whose draft had a token at place j and whose tokens before it were accepted; accepted[j]: those
    where it was accepted too. draft_seconds, verify_seconds: wall time of the two parts of these rounds, the reading of
    the prompt left out.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    levels: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def count(self, draft: Draft, num_accepted: int, num_emitted: int, verify_seconds: float) -> None:
        """One round. num_emitted: fewer than num_accepted + 1 where the answer ended within the draft."""
        depth = draft_depth(draft)
        self._add([1] * min(num_accepted + 1, depth), [1] * num_accepted)
        self.rounds += 1
        self.levels += depth
        self.emitted += num_emitted
        self.drafted += len(draft)
        self.verify_seconds += verify_seconds

    def _add(self, reached: list[int], accepted: list[int]) -> None:
        for counts, more in ((self.reached, reached), (self.accepted, accepted)):
            counts.extend([0] * (len(reached) - len(counts)))
            for place, number in enumerate(more):
                counts[place] += number

    @classmethod
    def total(cls, parts: Iterable[Speculation]) -> Speculation:
        """All of them together."""
        whole = cls()
        for part in parts:
            whole._add(part.reached, part.accepted)
            whole.rounds += part.rounds
            whole.emitted += part.emitted
            whole.drafted += part.drafted
            whole.levels += part.levels
            whole.draft_seconds += part.draft_seconds
            whole.verify_seconds += part.verify_seconds
        return whole

    @property
    def tau(self) -> float:
        """Tokens per forward of the target."""
        return self.emitted / self.rounds if self.rounds else 1.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of drafts accepted at each place, given that those before it were."""
        return tuple(hit / tried for hit, tried in zip(self.accepted, self.reached, strict=True) if tried)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return sum(self.accepted) / self.drafted if self.drafted else 0.0


def draft_depth(draft: Draft) -> int:
    """Levels of a draft."""
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return max(depths, default=0)
