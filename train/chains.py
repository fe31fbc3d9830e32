"""Which drafts a packed batch holds: one chain of unrolled steps for every token that the target wrote.

Row t of a conversation reads the target's state at token t and the embedding of token t + 1, and drafts token t + 2.
From there step j of the same chain reads its own last output and the embedding of token t + 1 + j, and drafts token
t + 2 + j. Chains begin where token t + 2 is one that the target wrote and end with that text: elsewhere nothing is
ever drafted. So queries are computed for chains alone, and earlier tokens contribute only their keys and values.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from train.loop.batches import Batch


@dataclass(frozen=True)
class Segment:
    """One conversation's share of a batch: its chains, and the tokens that they may look at."""

    chains: slice
    tokens: slice


@dataclass(frozen=True)
class Chains:
    """The chains of a batch of T tokens, in the order of its tokens.

    rows: int64 [C], the token at which each begins. drafts_written: bool [k, C], whether step j's draft, token
    rows + 2 + j, is the target's, and those before it too. segments: conversations that have chains.
    """

    rows: Tensor
    drafts_written: Tensor
    segments: tuple[Segment, ...]

    @property
    def num_steps(self) -> int:
        return len(self.drafts_written)

    def read_tokens(self, step: int, num_tokens: int) -> Tensor:
        """int64 [C]: the token whose embedding each chain reads at `step`, and whose state gives the distribution that
        it should draft from; the batch's last token for chains that have already left the batch."""
        return (self.rows + (1 + step)).clamp_(max=num_tokens - 1)


def find_chains(batch: Batch, num_steps: int) -> Chains:
    """The chains of `batch`, `num_steps` long."""
    num_tokens = len(batch.token_ids)
    device = batch.token_ids.device
    ends = torch.repeat_interleave(batch.starts[1:], batch.starts.diff(), output_size=num_tokens)
    tokens = torch.arange(num_tokens, device=device)
    written = torch.zeros(num_steps, num_tokens, dtype=torch.bool, device=device)
    still = torch.ones(num_tokens, dtype=torch.bool, device=device)
    for step in range(num_steps):
        drafted = tokens + (2 + step)
        still = still & (drafted < ends) & batch.loss_mask[drafted.clamp(max=num_tokens - 1)]
        written[step] = still
    rows = written[0].nonzero()[:, 0]
    starts = batch.starts.tolist()
    bounds = torch.searchsorted(rows, batch.starts).tolist()
    last_rows = rows.tolist()
    segments = tuple(
        Segment(slice(first, last), slice(begin, last_rows[last - 1] + 1))
        for begin, (first, last) in zip(starts, pairwise(bounds), strict=False)
        if first < last
    )
    return Chains(rows, written[:, rows], segments)
