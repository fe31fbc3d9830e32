"""Documents cut into sequences."""

import numpy as np

from train.intermediate.texts import MIN_TOKENS, TextPart, cut_documents


def test_parts_hold_every_token_but_short_rests_and_span_no_two_documents() -> None:
    documents = [list(range(100)), list(range(200, 200 + MIN_TOKENS - 1)), list(range(300, 345))]
    parts = [part.token_ids.tolist() for part in cut_documents(documents, 45)]
    assert parts == [list(range(45)), list(range(45, 90)), list(range(300, 345))]


def test_every_token_but_the_first_is_learned_from() -> None:
    assert TextPart(np.arange(4, dtype=np.int32)).loss_mask().tolist() == [False, True, True, True]
    assert TextPart(np.arange(0, dtype=np.int32)).loss_mask().tolist() == []
