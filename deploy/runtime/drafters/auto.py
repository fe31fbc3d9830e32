"""Which drafter, round by round: the one that has given most tokens per second, "none" being one of them.

Every candidate starts with the rate that the plan predicts (deploy/runtime/plan.py) and then earns its own: tokens over
wall time of its rounds, recent ones weighing more. Acceptance differs by kind of text, and within one; so a candidate
that lost is tried again, at first soon, then ever more seldom, and the later the more it lost by, which bounds what
trying costs. A lookup is a candidate only where the text's end occurred before, and one for each length of the match:
longer ones are right more often. What repeats itself is easier for every drafter, so rates are kept apart by the length
of that match too: a head's rate where there is none says little of its rate where there is one.

A head or a model that drafts first reads what was written without it, the prompt above all. That is paid once for all
the rounds that follow, so it is not held against the round in which it happens. Nor is what forwards of one row lose
after others (`python -m benchmarks.settling`) held against going without a draft.

Which tokens come out does not depend on any of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.runtime.drafters.base import Drafter, Float32
from deploy.runtime.drafters.confident import ConfidentDrafter
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft

_MEMORY = 0.97
"""What a round weighs after one more of the same candidate."""
_PRIOR_ROUNDS = 3.0
"""What a prediction weighs."""
_REMEMBERED_ROUNDS = 12.0
"""What all that was learnt from earlier answers weighs in the next."""
_TRIAL_ROUNDS = 3
_FIRST_WAIT, _LONGEST_WAIT = 16, 256
"""Rounds without a candidate before it is tried again, for a few rounds in a row."""
_CERTAIN_TRIAL_ROUNDS, _CERTAIN_WAITS = 6, 4
"""The same of one whose tokens are known, so that only its time can have changed; waits are this many times longer."""
_READING_ROUNDS, _SETTLING_FORWARDS = 1, 3
"""Rounds after another candidate's that may take longer than those that follow. What a model gives in them counts, as
if they had taken the usual time at most; of one whose tokens are known they tell nothing."""
_ROW_PRIOR = 15.0
"""What a row's time as it was measured before weighs, in squares of rows: four forwards whose rows vary by two."""
_PATIENCE = 4
"""How much longer one that is known to be slow waits: by this power of the ratio of the best rate to its own."""
_LONGEST_ROUND = 3.0
"""A round that took more than this many times its candidate's usual time met something else: it counts as so many."""


@dataclass(frozen=True)
class Candidate:
    """A way to draft. tokens, milliseconds: predicted, a round's.

    match_length: for a lookup, of the matches that it stands for. is_certain: a round gives `tokens` whatever the text
    is, as one without a draft does.
    """

    name: str
    drafter: Drafter
    tokens: float
    milliseconds: float
    match_length: int | None = None
    is_certain: bool = False

    @property
    def settling_rounds(self) -> int:
        """After another's: of a model that has to read the text, and of forwards without a draft."""
        if self.match_length is not None:
            return 0
        return _SETTLING_FORWARDS if self.is_certain else _READING_ROUNDS


@dataclass
class _Record:
    """What a candidate gave and took, in decayed sums."""

    tokens: float
    milliseconds: float
    is_certain: bool = False
    weight: float = _PRIOR_ROUNDS
    idle: int = 0
    wait: int = _FIRST_WAIT
    trials: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.milliseconds

    def add(self, tokens: int, milliseconds: float, longest: float = _LONGEST_ROUND) -> None:
        """One more round. longest: what it may count as, in usual rounds."""
        usual = self.milliseconds / self.weight
        self.tokens = _MEMORY * self.tokens + tokens
        self.milliseconds = _MEMORY * self.milliseconds + min(milliseconds, longest * usual)
        self.weight = _MEMORY * self.weight + 1

    def fade(self) -> None:
        """Keep the rate, but let what comes now decide, and be tried again soon. Rounds without it go on counting: of
        short answers none has as many as one that lost clearly has to wait."""
        share = min(1.0, _REMEMBERED_ROUNDS / self.weight)
        self.tokens, self.milliseconds, self.weight = (
            value * share for value in (self.tokens, self.milliseconds, self.weight)
        )
        self.wait = _FIRST_WAIT

    def pass_by(self, best_rate: float) -> None:
        """A round whose choice is not made yet. After enough of them without it, it is to be tried."""
        self.idle += 1
        patience = (best_rate / self.rate) ** _PATIENCE * (_CERTAIN_WAITS if self.is_certain else 1)
        if self.trials == 0 and self.idle >= self.wait * patience:
            self.trials = _CERTAIN_TRIAL_ROUNDS if self.is_certain else _TRIAL_ROUNDS
            self.wait = min(2 * self.wait, _LONGEST_WAIT)


class _RowCost:
    """What one more row adds to a forward, in milliseconds: the slope of a line through recent forwards, of no more
    rows than were measured before. What was measured is where it begins, and holds where rows do not vary; but a
    machine whose memory or cores others use is not the same an hour later.

    known: rows → milliseconds.
    """

    def __init__(self, known: Mapping[int, float]) -> None:
        self._most_rows = max(known)
        self._known = float(np.polyfit(list(known), list(known.values()), 1)[0]) if len(known) > 1 else 0.0
        self._sums = np.zeros(5)  # of weights, rows, milliseconds, rows², rows · milliseconds

    def add(self, rows: int, milliseconds: float) -> None:
        """One more forward; one that met something else counts as if it had met less."""
        if rows > self._most_rows:
            return
        weight, x, y = self._sums[:3]
        if weight:
            usual = max(y, y + self.slope * (weight * rows - x)) / weight
            milliseconds = min(milliseconds, _LONGEST_ROUND * usual)
        self._sums *= _MEMORY
        self._sums += 1.0, rows, milliseconds, rows * rows, rows * milliseconds

    @property
    def slope(self) -> float:
        weight, x, y, xx, xy = self._sums
        if not weight:
            return max(self._known, 0.0)
        spread, along = xx - x * x / weight, xy - x * y / weight
        return max(float(along + _ROW_PRIOR * self._known) / float(spread + _ROW_PRIOR), 0.0)


@dataclass
class _Round:
    """The round that is under way: whose record it goes into, whether it is one of the first after another candidate's,
    since when, when the draft was there and how many rows it made."""

    record: _Record
    is_settling: bool
    begin: float
    drafted: float
    rows: int


class AutoDrafter:
    """Drafter (deploy/runtime/drafters/base.py) that takes the best of `candidates` in each round.

    candidates: by preference where rates are equal; those of one lookup share its drafter. rows_ms: rows → milliseconds
    of a forward of the model above, as measured before. A head whose drafts follow its confidence (ConfidentDrafter) is
    told what a row is worth: what its time, which rounds tell ever anew, gives at the rate that the head has earned.
    clock: seconds. `choices` counts rounds by candidate.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        rows_ms: Mapping[int, float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not candidates:
            raise ValueError("auto needs at least one candidate")
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self._lookups = {id(c.drafter): c.drafter for c in candidates if c.match_length is not None}
        lengths = {0} | {c.match_length for c in candidates if c.match_length is not None}
        self._records = {
            length: {c.name: _new_record(c) for c in candidates if c.match_length in (None, length)}
            for length in lengths
        }
        self._drafters = list({id(c.drafter): c.drafter for c in candidates}.values())
        self.taps = tuple(sorted({layer for drafter in self._drafters for layer in drafter.taps}))
        self._rounds: dict[int, _Round] = {}
        self._in_a_row: dict[int, tuple[Drafter, int]] = {}  # sequence → who drafted last, and how often in a row
        self._row_cost = _RowCost(rows_ms) if rows_ms else None
        self._num_committed = 0  # sequences, since the last draft was begun
        self._last_forward: tuple[int, float] | None = None  # rows and milliseconds
        self._clock = clock
        self.choices: dict[str, int] = dict.fromkeys(self._candidates, 0)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """As they were given."""
        return tuple(self._candidates.values())

    def begin(self, sequence: int, length: int) -> int:
        """All of them go on from the same token: from the earliest that one of them wants."""
        places = [length + 1] * len(self._drafters)
        while max(places) > length:
            # One that is there already is not asked again: a head would go back by one more token.
            for index, drafter in enumerate(self._drafters):
                if places[index] > length:
                    places[index] = drafter.begin(sequence, length)
            length = min(places)
        self._rounds.pop(sequence, None)
        self._in_a_row.pop(sequence, None)
        for records in self._records.values():
            for record in records.values():
                record.fade()
        return length

    def commit(self, sequence: int, tokens: Sequence[int], features: Float32 | None) -> None:
        now = self._clock()  # a head that reads what others drafted is not held against their round
        for drafter in self._drafters:
            drafter.commit(sequence, tokens, self._states_of(drafter, features))
        finished = self._rounds.pop(sequence, None)
        self._num_committed += 1
        if finished is not None:
            longest = 1.0 if finished.is_settling else _LONGEST_ROUND
            if not (finished.is_settling and finished.record.is_certain):
                finished.record.add(len(tokens), (now - finished.begin) * 1e3, longest)
            self._last_forward = finished.rows, (now - finished.drafted) * 1e3

    def _learn_row_cost(self) -> None:
        """From the last round's forward, where no other sequence had rows in it."""
        if self._row_cost is not None and self._last_forward is not None and self._num_committed == 1:
            self._row_cost.add(*self._last_forward)
        self._num_committed, self._last_forward = 0, None

    def _states_of(self, drafter: Drafter, features: Float32 | None) -> Float32 | None:
        if features is None or not drafter.taps:
            return None
        if tuple(drafter.taps) == self.taps:
            return features
        by_layer = np.split(features, len(self.taps), axis=1)
        return np.concatenate([by_layer[self.taps.index(layer)] for layer in drafter.taps], axis=1)

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        begin = self._clock()
        self._learn_row_cost()
        records = self._records[self._match_length(sequence, path)]
        name = _choose(records)
        self.choices[name] += 1
        candidate = self._candidates[name]
        drafter = candidate.drafter
        before, count = self._in_a_row.get(sequence, (None, 0))
        count = count + 1 if before is drafter else 1
        self._in_a_row[sequence] = drafter, count
        is_settling = count <= candidate.settling_rounds
        if self._row_cost is not None and isinstance(drafter, ConfidentDrafter):
            drafter.worth = self._row_cost.slope * records[name].rate
        draft = drafter.propose(sequence, path, budget, sampling, sample_index)
        self._rounds[sequence] = _Round(records[name], is_settling, begin, self._clock(), 1 + len(draft))
        return draft

    def _match_length(self, sequence: int, path: Sequence[int]) -> int:
        """How long an end of the text occurred before, as lookups count it; 0 where none did."""
        lengths = [0]
        for drafter in self._lookups.values():
            assert isinstance(drafter, LookupDrafter)
            match = drafter.find(sequence, path)
            if match is not None and match.length in self._records:
                lengths.append(match.length)
        return max(lengths)

    def reset(self, sequence: int) -> None:
        for drafter in self._drafters:
            drafter.reset(sequence)
        self._rounds.pop(sequence, None)
        self._in_a_row.pop(sequence, None)

    def rates(self) -> Mapping[str, float]:
        """Tokens per second by candidate, as it stands, over texts with and without a match."""
        found = {}
        for name in self._candidates:
            records = [each[name] for each in self._records.values() if name in each]
            found[name] = 1e3 * sum(each.tokens for each in records) / sum(each.milliseconds for each in records)
        return found


def _new_record(candidate: Candidate) -> _Record:
    return _Record(candidate.tokens * _PRIOR_ROUNDS, candidate.milliseconds * _PRIOR_ROUNDS, candidate.is_certain)


def _choose(records: Mapping[str, _Record]) -> str:
    """The best, or one whose turn to be tried again has come."""
    best = max(records, key=lambda name: records[name].rate)
    chosen = best
    for name, record in records.items():
        record.pass_by(records[best].rate)
        if name != best and record.trials > 0:
            chosen = name
    record = records[chosen]
    record.idle = 0
    record.trials = max(record.trials - 1, 0)
    if chosen == best:
        record.wait, record.trials = _FIRST_WAIT, 0
    return chosen
