"""Replayed acceptance against a model that really drafts, token by token, reading its own drafts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from train.intermediate.objective import Tokens
from train.intermediate.rollout import HeldOutTexts
from train.replay import text_batch


@torch.no_grad()
def speculate(lm: Any, text: Any, draft_ids: Sequence[int], num_drafted: int) -> tuple[int, int, list[int]]:
    """Decode a text again with drafts: rounds, tokens emitted, and accepted drafts of every round."""
    ids, allowed = text.token_ids.tolist(), torch.tensor(draft_ids)
    rounds, emitted, accepted = 0, 0, []
    for begin, end in text.spans:
        known = max(begin, 1) + 1  # the prompt and the first token, which reading the prompt gave
        while known < end:
            path = ids[:known]
            for _ in range(num_drafted):
                logits = lm(input_ids=torch.tensor([path])).logits[0, -1]
                path = [*path, int(allowed[logits[allowed].argmax()])]
            hits = 0
            while hits < num_drafted and known + hits < end and path[known + hits] == ids[known + hits]:
                hits += 1
            gained = min(hits + 1, end - known)
            rounds, emitted, known = rounds + 1, emitted + gained, known + gained
            accepted.append(hits)
    return rounds, emitted, accepted


def taught(tiny: Any, texts: Sequence[Any], vocabulary: Any, num_updates: int) -> Any:
    """A model that has learnt the texts half-way, so that chains of every length get accepted."""
    model = tiny.model(initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_updates):
        optimizer.zero_grad()
        losses = Tokens(vocabulary).losses(model, text_batch(texts))
        (losses.total / losses.count).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("size", [61, 23])
@pytest.mark.parametrize("num_drafted", [1, 4])
def test_replay_counts_what_a_model_drafting_on_its_own_gets_accepted(tiny: Any, size: int, num_drafted: int) -> None:
    spans = [[(9, 40)], [(4, 12), (20, 31)], [(0, 17)], [(5, 6), (9, 22)]]
    texts = tiny.texts(num_drafted, spans, [43, 31, 19, 22])
    vocabulary = tiny.vocabulary(size)
    for text in texts:  # few different tokens, most of them in the vocabulary
        text.token_ids[:] = np.array([*vocabulary.ids[:9].tolist(), 0])[text.token_ids % 10]
    model = taught(tiny, texts, vocabulary, num_updates=25)
    found = HeldOutTexts(texts).replay_model(model, vocabulary, num_drafted)
    alone = tiny.lm()
    alone.load_state_dict(model.lm.state_dict())
    rounds, emitted, accepted = 0, 0, []
    for text in texts:
        one = speculate(alone, text, vocabulary.ids.tolist(), num_drafted)
        rounds, emitted, accepted = rounds + one[0], emitted + one[1], accepted + one[2]
    assert (found.rounds, found.emitted) == (rounds, emitted)
    assert found.accepted == tuple(sum(hits > place for hits in accepted) for place in range(num_drafted))
    assert found.accepted[-1] > 0 and min(accepted) == 0, "the case must show rounds of different lengths"


def test_a_model_is_asked_only_for_drafts_of_what_the_target_wrote(tiny: Any) -> None:
    texts = tiny.texts(0, [[(4, 9)], [(2, 3)]], [12, 6])
    asked: list[int] = []

    def likeliest(_texts: Sequence[Any], after: Sequence[int]) -> list[int]:
        asked.extend(after)
        return [0] * len(after)

    HeldOutTexts(texts).replay(likeliest, 4, np.arange(61))
    assert asked == [3, 4, 5, 6, 7]


def test_texts_that_were_sampled_are_left_out(tiny: Any) -> None:
    texts = [*tiny.texts(0, [[(4, 9)]], [12]), tiny.Text(np.arange(12, dtype=np.int32), ((4, 9),), 0.8)]
    assert HeldOutTexts(texts).num_conversations == 1
    with pytest.raises(ValueError, match="none of the 1 held-out conversations is greedy"):
        HeldOutTexts(texts[1:])
