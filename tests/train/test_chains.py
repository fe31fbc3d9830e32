"""Which drafts a batch holds, against a loop over conversations."""

from itertools import pairwise
from typing import Any

import torch

from train.chains import find_chains
from train.loop.batches import Batch


def chains_by_loop(batch: Batch, num_steps: int) -> dict[int, list[bool]]:
    """Row → whether each of its drafts is the target's, with all before it."""
    found = {}
    starts = batch.starts.tolist()
    for begin, end in pairwise(starts):
        for row in range(begin, end):
            drafted = range(row + 2, row + 2 + num_steps)
            is_written = [token < end and bool(batch.loss_mask[token]) for token in drafted]
            if is_written[0]:
                found[row] = [all(is_written[: step + 1]) for step in range(num_steps)]
    return found


def test_chains_begin_where_the_target_wrote_the_drafted_token_and_end_with_its_text(eagle: Any) -> None:
    batch = eagle.batch(seed=3)
    chains = find_chains(batch, 5)
    assert dict(zip(chains.rows.tolist(), chains.drafts_written.T.tolist(), strict=True)) == chains_by_loop(batch, 5)


def test_segments_give_each_conversation_its_chains_and_no_other_conversations_tokens(eagle: Any) -> None:
    batch = eagle.batch(seed=3)
    chains = find_chains(batch, 3)
    assert len(chains.segments) == 3  # one of the four has nothing to draft
    for segment in chains.segments:
        rows = chains.rows[segment.chains]
        assert segment.tokens.start in batch.starts.tolist()
        assert segment.tokens.stop == int(rows.max()) + 1
        assert bool((batch.position[segment.tokens].diff() == 1).all())
    covered = torch.cat([chains.rows[segment.chains] for segment in chains.segments])
    assert torch.equal(covered, chains.rows)


def test_a_batch_without_written_text_has_no_chains(eagle: Any) -> None:
    batch = eagle.pack(eagle.conversations(0, [[], []], [9, 5]))
    chains = find_chains(batch, 3)
    assert chains.rows.tolist() == []
    assert chains.segments == ()
