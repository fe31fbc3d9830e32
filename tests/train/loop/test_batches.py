"""Packing: every text once an epoch, in an order that depends on (seed, epoch) alone, from any position on."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from tests.train.loop.tiny import Text, texts
from train.loop.batches import BatchPlan, Position, StepPlan, pack

TEXTS = texts(101, seed=3)


def make_plan(seed: int = 5, max_length: int = 31, sequences: list[Text] | None = None) -> BatchPlan:
    chosen = TEXTS if sequences is None else sequences
    return BatchPlan(chosen, tokens_per_batch=70, max_length=max_length, seed=seed)


def first(plan: BatchPlan, count: int, start: Position | None = None, batches_per_step: int = 3) -> list[StepPlan]:
    return list(islice(plan.steps(start or Position(), batches_per_step), count))


def test_every_epoch_holds_every_text_once_and_no_batch_more_tokens_than_allowed() -> None:
    plan = make_plan()
    for epoch in range(3):
        stream = first(plan, 200, Position(epoch), batches_per_step=1)
        batches = [step.batches[0] for step in stream[: 1 + [step.end.epoch for step in stream].index(epoch + 1)]]
        assert sorted(index for batch in batches for index in batch) == list(range(len(TEXTS)))
        sizes = [sum(len(plan.token_ids(index)) for index in batch) for batch in batches]
        assert max(sizes) <= 70
        assert np.mean(sizes) > 0.9 * 70


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert first(make_plan(), 40) == first(make_plan(), 40)
    assert first(make_plan(), 5) != first(make_plan(seed=6), 5)
    assert first(make_plan(), 5)[0].batches != first(make_plan(), 5, Position(1))[0].batches


def test_the_stream_from_any_position_is_the_rest_of_the_whole_stream() -> None:
    whole = first(make_plan(), 60)
    assert whole[-1].end.epoch >= 3
    for done in (1, 7, 33):
        assert first(make_plan(), 60 - done, whole[done - 1].end) == whole[done:]


def test_a_step_at_the_end_of_an_epoch_takes_batches_of_the_next() -> None:
    plan = make_plan()
    singles = [step.batches[0] for step in first(plan, 90, batches_per_step=1)]
    grouped = [batch for step in first(plan, 30) for batch in step.batches]
    assert grouped == singles


def test_a_step_counts_its_tokens() -> None:
    plan = make_plan()
    for step in first(plan, 10):
        assert step.num_tokens == sum(len(plan.batch(batch).token_ids) for batch in step.batches)


def test_epochs_are_counted_in_batches() -> None:
    plan = make_plan()
    ends = [step.end for step in first(plan, 40, batches_per_step=1)]
    length = 1 + [end.epoch for end in ends].index(1)
    assert [plan.epochs(end) for end in ends[:length]] == [(i + 1) / length for i in range(length)]


def test_a_batch_holds_its_texts_one_after_the_other() -> None:
    sequences = texts(18, seed=6, longest=29)  # of which none is left out
    plan = make_plan(max_length=10, sequences=sequences)
    batch = plan.batch([4, 0, 17])
    kept = [sequences[index].token_ids[:10] for index in (4, 0, 17)]
    masks = [sequences[index].loss_mask()[:10] for index in (4, 0, 17)]
    assert batch.token_ids.tolist() == [int(token) for text in kept for token in text]
    assert batch.loss_mask.tolist() == [bool(flag) for mask in masks for flag in mask]
    assert batch.position.tolist() == [position for text in kept for position in range(len(text))]
    assert batch.starts.tolist() == [0, *np.cumsum([len(text) for text in kept]).tolist()]
    kinds = [batch.token_ids.dtype, batch.loss_mask.dtype, batch.position.dtype, batch.starts.dtype]
    assert kinds == [torch.int64, torch.bool, torch.int64, torch.int64]


class Prompt(Text):
    """Nothing in it is learned from."""

    def loss_mask(self) -> np.ndarray:
        return np.zeros(len(self.token_ids), bool)


def test_texts_without_anything_to_learn_are_left_out() -> None:
    plan = make_plan(sequences=[Prompt(TEXTS[0].token_ids), TEXTS[1], Prompt(TEXTS[2].token_ids)])
    assert first(plan, 1, batches_per_step=1)[0].batches == ((0,),)
    assert plan.token_ids(0).tolist() == TEXTS[1].token_ids[:31].tolist()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "there is no text to train on"),
        ([Prompt(TEXTS[0].token_ids)], "none of the 1 training conversations .* max_length=31"),
    ],
)
def test_nothing_to_learn_at_all_is_an_error(sequences: list[Text], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(sequences=sequences)


def test_what_is_left_out_is_not_counted() -> None:
    plan = make_plan(sequences=[Prompt(TEXTS[0].token_ids), TEXTS[1]])
    assert (plan.num_sequences, plan.num_learned) == (1, int(TEXTS[1].loss_mask()[:31].sum()))


def test_the_digest_names_tokens_masks_and_order() -> None:
    tokens = [Text(text.token_ids.copy()) for text in TEXTS]
    assert make_plan(sequences=tokens).digest() == make_plan().digest()
    assert make_plan(sequences=tokens[::-1]).digest() != make_plan().digest()
    assert make_plan(sequences=[*tokens[:-1], Prompt(tokens[-1].token_ids)]).digest() != make_plan().digest()
    tokens[50].token_ids[2] ^= 1
    assert make_plan(sequences=tokens).digest() != make_plan().digest()


def test_packing_is_first_fit() -> None:
    lengths = [5, 6, 4, 3, 7, 1, 2, 9]
    assert pack(lengths, range(8), 10) == ((0, 2, 5), (1, 3), (4, 6), (7,))
    assert pack(lengths, [7, 3, 6, 0, 1, 2, 4, 5], 10) == ((7, 5), (3, 6, 0), (1, 2), (4,))


def test_packing_stays_within_the_capacity_with_many_batches_open_and_closed() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 5000).tolist()
    batches = pack(lengths, range(5000), 100)
    assert sorted(index for batch in batches for index in batch) == list(range(5000))
    sizes = [sum(lengths[index] for index in batch) for batch in batches]
    assert max(sizes) <= 100
    assert np.mean(sizes) > 90
