"""What a head is worth: how many of its drafts the target would have accepted on held-out text (train/replay.py).

While a chain's drafts match the text, the head reads the same tokens as in the training-time test's unrolled steps and
computes the same: one pass of those gives every chain.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.chains import Chains, find_chains
from train.eagle.head import EagleHead
from train.eagle.objective import read_columns
from train.eagle.unroll import unroll
from train.features import FeatureSource
from train.loop.batches import Batch
from train.products import linear
from train.replay import Acceptance, Replay, WrittenText, count_matches, greedy_texts, pack_texts, text_batch

ROWS_PER_SLICE = 1024


class HeldOut:
    """Greedy texts of the target with its hidden states, and the replay of any head on them.

    Captures the states once, in its constructor, and keeps them: float32, T · L · H numbers. conversations: those that
    were sampled at a temperature above 0 are left out. columns: which of the source's states the head reads. Raises
    ValueError when no greedy conversation has two written tokens in a row.
    """

    def __init__(self, conversations: Sequence[WrittenText], features: FeatureSource, columns: tuple[int, ...]) -> None:
        greedy = greedy_texts(conversations)
        self.num_conversations = len(greedy)
        self._columns = columns
        self._parts = [(texts, _capture(texts, features)) for texts in pack_texts(greedy)]

    @torch.no_grad()
    def replay(self, head: EagleHead, draft_ids: Tensor, num_drafted: int, *, kept: Tensor | None = None) -> Acceptance:
        """Speculative decoding with `num_drafted` tokens a round.

        draft_ids: int64 [D], the target's ids of the head's vocabulary. kept: int64, ascending places in it that the
        head may draft; by default all (a smaller vocabulary needs no training: VocabTrim).
        """
        kept = torch.arange(len(draft_ids), device=draft_ids.device) if kept is None else kept
        found = Replay(num_drafted, draft_ids[kept].cpu().numpy())
        for texts, batch in self._parts:
            moved = batch.to(draft_ids.device)
            chains = find_chains(moved, num_drafted)
            drafted = self._drafted(head, moved, chains, draft_ids[kept], kept)
            found.add(texts, chains, count_matches(moved, chains, drafted))
        return found.acceptance()

    def _drafted(self, head: EagleHead, batch: Batch, chains: Chains, kept_ids: Tensor, kept: Tensor) -> Tensor:
        """int64 [k, C]: the target's id of each chain's draft at each step."""
        assert batch.features is not None
        states = unroll(head, batch, read_columns(batch.features, self._columns), chains)
        rows = head.lm_head.weight[kept]
        drafts = torch.cat([linear(part, rows).argmax(-1) for part in states.flatten(0, 1).split(ROWS_PER_SLICE)])
        return kept_ids[drafts].view(states.shape[:2])


def _capture(texts: Sequence[WrittenText], features: FeatureSource) -> Batch:
    """The batch that holds the texts in this order."""
    captured = features.capture([text.token_ids for text in texts])
    return text_batch(texts, torch.from_numpy(np.concatenate(captured)))
