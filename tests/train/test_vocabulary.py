"""Counting, keeping, mapping, and choosing a draft vocabulary's size."""

from collections import Counter

import numpy as np
import pytest

from train.vocabulary import VocabularyChoice, best_choice, count_tokens, keep_most_frequent, mbsu, vocabulary_maps


def test_counts_are_those_of_all_texts_together() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 17, length).astype(np.int32) for length in (5, 0, 31)]
    expected = Counter(int(token) for text in texts for token in text)
    assert count_tokens(texts, 23).tolist() == [expected[token] for token in range(23)]


def test_the_most_frequent_tokens_are_kept_in_ascending_order() -> None:
    counts = np.array([3, 9, 0, 7, 1, 8])
    assert keep_most_frequent(counts, 3, end_ids=[]).tolist() == [1, 3, 5]


def test_tokens_that_end_a_text_are_kept_however_rare() -> None:
    counts = np.array([3, 9, 0, 7, 1, 8])
    assert keep_most_frequent(counts, 3, end_ids=[2, 4]).tolist() == [1, 2, 4]


def test_ties_go_to_the_lower_id() -> None:
    assert keep_most_frequent(np.zeros(6, np.int64), 3, end_ids=[4]).tolist() == [0, 1, 4]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_size_that_no_vocabulary_can_have_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"draft vocabulary of {size} tokens: must be at least 2 .* and at most 6"):
        keep_most_frequent(np.arange(6), size, end_ids=[0, 2])


def test_maps_lead_from_each_draft_id_to_its_token_and_mark_the_tokens() -> None:
    ids = np.array([0, 2, 3, 9])
    d2t, t2d = vocabulary_maps(ids, 11)
    assert (np.arange(4) + d2t).tolist() == ids.tolist()
    assert d2t.dtype == np.int64 and t2d.dtype == np.bool_
    assert np.flatnonzero(t2d).tolist() == ids.tolist()


def test_mbsu_is_the_papers() -> None:
    # FastDraft: block efficiency 3, a drafter of a tenth of the target, 5 drafted tokens: 3 / (0.1·5 + 1).
    assert mbsu(3.0, drafter_bytes=10, target_bytes=100, num_drafted=5) == pytest.approx(2.0)


def test_the_size_of_highest_mbsu_is_chosen_and_of_equals_the_smaller() -> None:
    sizes = [
        VocabularyChoice(4, 1.5, 10, 1.30),
        VocabularyChoice(8, 1.8, 20, 1.35),
        VocabularyChoice(16, 1.9, 40, 1.35),
    ]
    assert best_choice(sizes).size == 8
