"""Speculative decoding replayed on held-out text: how many of a drafter's tokens the target would have accepted.

On texts that the target wrote greedily the drafter drafts k tokens in a row from where the text stands, the drafts up
to the first that differs from the text are accepted, the target adds one token of its own, and the next round begins
there. As long as a chain's drafts match the text, the drafter reads what it would read in one teacher-forced pass over
the text; after the first mismatch nothing of the chain counts. So such a pass gives every chain that any replay can
need, exactly, and the replay only walks over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.chains import Chains
from train.loop.batches import Batch, pack

TOKENS_PER_BATCH = 2048


class WrittenText(Protocol):
    """A conversation (train/data/conversations.py)."""

    @property
    def token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def spans(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def temperature(self) -> float: ...
    def loss_mask(self) -> npt.NDArray[np.bool_]: ...


@dataclass(frozen=True)
class Acceptance:
    """Counts of replayed speculative decoding.

    rounds: calls of the target. emitted: tokens that they gave. reached[j]: rounds whose first j drafts were accepted
    and whose text goes on; accepted[j]: those of them whose draft j was accepted too. written: tokens that the target
    wrote. outside_vocabulary: those of them that the draft vocabulary lacks.
    """

    rounds: int
    emitted: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]
    written: int
    outside_vocabulary: int

    @property
    def tau(self) -> float:
        """Tokens per call of the target."""
        return self.emitted / self.rounds

    @property
    def by_position(self) -> tuple[float, ...]:
        """Share of drafts accepted at each place of a chain, given that those before it were."""
        return tuple(hit / max(tried, 1) for hit, tried in zip(self.accepted, self.reached, strict=True))

    def metrics(self) -> dict[str, float]:
        """tau, acceptance_1 … acceptance_k, and the share of the text outside the draft vocabulary."""
        shares = {f"acceptance_{place}": share for place, share in enumerate(self.by_position, 1)}
        return {"tau": self.tau, **shares, "outside_vocabulary": self.outside_vocabulary / self.written}


def greedy_texts(conversations: Sequence[WrittenText]) -> list[WrittenText]:
    """Those that can be replayed. Raises ValueError when none is greedy and has two written tokens in a row."""
    greedy = [text for text in conversations if text.temperature == 0 and _has_rounds(text)]
    if not greedy:
        raise ValueError(
            f"none of the {len(conversations)} held-out conversations is greedy and has two tokens to draft; "
            "generate more, or a larger share of them at temperature 0"
        )
    return greedy


def pack_texts(texts: Sequence[WrittenText]) -> list[list[WrittenText]]:
    """The texts in groups of about `TOKENS_PER_BATCH` tokens."""
    packed = pack([len(text.token_ids) for text in texts], range(len(texts)), TOKENS_PER_BATCH)
    return [[texts[index] for index in indices] for indices in packed]


def text_batch(texts: Sequence[WrittenText], features: Tensor | None = None) -> Batch:
    """The batch that holds the texts in this order."""
    ids = [text.token_ids for text in texts]
    lengths = [len(part) for part in ids]
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        loss_mask=torch.from_numpy(np.concatenate([text.loss_mask() for text in texts])),
        position=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        starts=torch.from_numpy(np.cumsum([0, *lengths])),
        features=features,
    )


def count_matches(batch: Batch, chains: Chains, drafted: Tensor) -> Tensor:
    """int64 [C, 2]: how many tokens each chain may draft within its text, and how many of them match it.

    drafted: int64 [k, C], the target's id of each draft.
    """
    num_tokens = len(batch.token_ids)
    read = torch.stack([chains.read_tokens(step, num_tokens) for step in range(chains.num_steps)])
    text = batch.token_ids[(read + 1).clamp(max=num_tokens - 1)]
    is_match = chains.drafts_written & (drafted == text)
    return torch.stack([chains.drafts_written.sum(0), is_match.long().cumprod(0).sum(0)], dim=1)


class Replay:
    """Walks over texts and counts. num_drafted: tokens a round. ids: the target's, of the draft vocabulary."""

    def __init__(self, num_drafted: int, ids: npt.NDArray[np.int64]) -> None:
        self._num_drafted, self._ids = num_drafted, ids
        self._counts = np.zeros(2 + 2 * num_drafted, dtype=np.int64)
        self._written = self._outside = 0

    def add(self, texts: Sequence[WrittenText], chains: Chains, matches: Tensor) -> None:
        """texts: as the batch that `chains` were found in packs them. matches: of `count_matches`."""
        self._counts += _walk(texts, chains.rows.tolist(), matches.tolist(), self._num_drafted)
        written = np.concatenate([text.token_ids[text.loss_mask()] for text in texts])
        self._written += len(written)
        self._outside += int((~np.isin(written, self._ids)).sum())

    def acceptance(self) -> Acceptance:
        """Of all texts added."""
        rounds, emitted, *places = self._counts.tolist()
        return Acceptance(
            rounds=rounds,
            emitted=emitted,
            reached=tuple(places[: self._num_drafted]),
            accepted=tuple(places[self._num_drafted :]),
            written=self._written,
            outside_vocabulary=self._outside,
        )


def _has_rounds(text: WrittenText) -> bool:
    return any(end - begin >= 2 for begin, end in text.spans)


def _walk(
    texts: Sequence[WrittenText], rows: Sequence[int], chains: Sequence[Sequence[int]], num_drafted: int
) -> npt.NDArray[np.int64]:
    """Replay over packed texts: rounds, emitted, then reached and accepted at each place.

    rows: the packed token at which each chain begins. chains: for each, the two numbers of `count_matches`.
    """
    by_row = dict(zip(rows, chains, strict=True))
    rounds, emitted, offset = 0, 0, 0
    reached, accepted = np.zeros(num_drafted, np.int64), np.zeros(num_drafted, np.int64)
    for text in texts:
        for begin, end in text.spans:
            # A span's first token comes out of reading the prompt; chains draft those after it.
            row, last = offset + max(begin, 1) - 1, offset + end - 3
            emitted += max(last - row + 1, 0)
            while row <= last:
                num_possible, num_matching = by_row[row]
                rounds += 1
                reached[: min(num_matching + 1, num_possible)] += 1
                accepted[:num_matching] += 1
                row += num_matching + 1
        offset += len(text.token_ids)
    return np.concatenate([[rounds, emitted], reached, accepted])
