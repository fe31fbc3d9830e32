"""What a head is worth: how many of its drafts the target would have accepted on held-out text.

Speculative decoding is replayed on texts that the target wrote greedily: the head drafts k tokens in a row from where
the text stands, the drafts up to the first that differs from the text are accepted, the target adds one token of its
own, and the next round begins there. As long as a chain's drafts match the text, the head reads the same tokens as in
the training-time test's unrolled steps and computes the same; after the first mismatch nothing of the chain counts. So
one teacher-forced pass over all positions gives every chain that any replay can need, exactly, and the replay only
walks over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear

from train.eagle.chains import Chains, find_chains
from train.eagle.head import EagleHead
from train.eagle.objective import read_columns
from train.eagle.unroll import unroll
from train.features import FeatureSource
from train.loop.batches import Batch, pack

TOKENS_PER_BATCH = 2048
ROWS_PER_SLICE = 1024


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


class HeldOut:
    """Greedy texts of the target with its hidden states, and the replay of any head on them.

    Captures the states once, in its constructor, and keeps them: float32, T · L · H numbers. conversations: those that
    were sampled at a temperature above 0 are left out. columns: which of the source's states the head reads. Raises
    ValueError when no greedy conversation has two written tokens in a row.
    """

    def __init__(self, conversations: Sequence[WrittenText], features: FeatureSource, columns: tuple[int, ...]) -> None:
        greedy = [text for text in conversations if text.temperature == 0 and _has_rounds(text)]
        if not greedy:
            raise ValueError(
                f"none of the {len(conversations)} held-out conversations is greedy and has two tokens to draft; "
                "generate more, or a larger share of them at temperature 0"
            )
        self.num_conversations = len(greedy)
        self._columns = columns
        lengths = [len(text.token_ids) for text in greedy]
        packed = pack(lengths, range(len(greedy)), TOKENS_PER_BATCH)
        self._parts = [_capture([greedy[index] for index in indices], features) for indices in packed]

    @torch.no_grad()
    def replay(self, head: EagleHead, draft_ids: Tensor, num_drafted: int, *, kept: Tensor | None = None) -> Acceptance:
        """Speculative decoding with `num_drafted` tokens a round.

        draft_ids: int64 [D], the target's ids of the head's vocabulary. kept: int64, ascending places in it that the
        head may draft; by default all (a smaller vocabulary needs no training: VocabTrim).
        """
        kept = torch.arange(len(draft_ids), device=draft_ids.device) if kept is None else kept
        counts = np.zeros(2 + 2 * num_drafted, dtype=np.int64)
        for texts, batch in self._parts:
            moved = batch.to(draft_ids.device)
            chains = find_chains(moved, num_drafted)
            matches = self._matches(head, moved, chains, draft_ids[kept], kept)
            counts += _walk(texts, chains.rows.tolist(), matches.tolist(), num_drafted)
        ids = draft_ids[kept].cpu().numpy()
        written = np.concatenate([text.token_ids[text.loss_mask()] for texts, _ in self._parts for text in texts])
        rounds, emitted, *places = counts.tolist()
        return Acceptance(
            rounds=rounds,
            emitted=emitted,
            reached=tuple(places[:num_drafted]),
            accepted=tuple(places[num_drafted:]),
            written=len(written),
            outside_vocabulary=int((~np.isin(written, ids)).sum()),
        )

    def _matches(self, head: EagleHead, batch: Batch, chains: Chains, kept_ids: Tensor, kept: Tensor) -> Tensor:
        """int64 [C, 2]: how many tokens each chain may draft within its text, and how many of them match it."""
        assert batch.features is not None
        states = unroll(head, batch, read_columns(batch.features, self._columns), chains)
        rows = head.lm_head.weight[kept]
        drafts = torch.cat([linear(part, rows).argmax(-1) for part in states.flatten(0, 1).split(ROWS_PER_SLICE)])
        num_tokens = len(batch.token_ids)
        read = torch.stack([chains.read_tokens(step, num_tokens) for step in range(chains.num_steps)])
        text = batch.token_ids[(read + 1).clamp(max=num_tokens - 1)]
        is_match = chains.drafts_written & (kept_ids[drafts].view_as(text) == text)
        return torch.stack([chains.drafts_written.sum(0), is_match.long().cumprod(0).sum(0)], dim=1)


def _has_rounds(text: WrittenText) -> bool:
    return any(end - begin >= 2 for begin, end in text.spans)


def _capture(texts: Sequence[WrittenText], features: FeatureSource) -> tuple[Sequence[WrittenText], Batch]:
    """The texts, and the batch that holds them in this order."""
    ids = [text.token_ids for text in texts]
    lengths = [len(part) for part in ids]
    batch = Batch(
        token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        loss_mask=torch.from_numpy(np.concatenate([text.loss_mask() for text in texts])),
        position=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        starts=torch.from_numpy(np.cumsum([0, *lengths])),
        features=torch.from_numpy(np.concatenate(features.capture(ids))),
    )
    return texts, batch


def _walk(
    texts: Sequence[WrittenText], rows: Sequence[int], chains: Sequence[Sequence[int]], num_drafted: int
) -> npt.NDArray[np.int64]:
    """Replay over packed texts: rounds, emitted, then reached and accepted at each place.

    rows: the packed token at which each chain begins. chains: for each, the two numbers of `_matches`.
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
