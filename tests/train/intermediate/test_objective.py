"""Which tokens count, and what the two losses are, against a loop over the batch's tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from train.distillation import Teacher
from train.intermediate.objective import Distribution, Tokens
from train.loop.batches import Batch

SIZES = [61, 23]


def counted(batch: Batch, ids: list[int]) -> list[int]:
    """The tokens that count: learned from, not a conversation's first, in the vocabulary."""
    return [
        index
        for index, token in enumerate(batch.token_ids.tolist())
        if batch.loss_mask[index] and batch.position[index] > 0 and token in ids
    ]


def learned(batch: Batch) -> int:
    return int((batch.loss_mask & (batch.position > 0)).sum())


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_scored_over_the_draft_vocabulary_after_what_precedes_them(tiny: Any, size: int) -> None:
    model, batch, vocabulary = tiny.model(), tiny.batch(), tiny.vocabulary(size)
    ids = vocabulary.ids.tolist()
    losses = Tokens(vocabulary).losses(model, batch)
    log_probabilities = (model.states(batch) @ model.head[vocabulary.ids].t()).log_softmax(-1)
    tokens = counted(batch, ids)
    wanted = [-log_probabilities[index - 1, ids.index(int(batch.token_ids[index]))] for index in tokens]
    torch.testing.assert_close(losses.total, torch.stack(wanted).sum())
    assert losses.count == len(tokens) > 0
    assert losses.metrics["outside_vocabulary"] == learned(batch) - len(tokens)
    assert (losses.metrics["outside_vocabulary"] > 0) == (size < 61)


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_autograds(tiny: Any, size: int) -> None:
    model, batch, vocabulary = tiny.model(), tiny.batch(), tiny.vocabulary(size)
    Tokens(vocabulary).losses(model, batch).total.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    log_probabilities = (model.states(batch) @ model.head[vocabulary.ids].t()).log_softmax(-1)
    ids = vocabulary.ids.tolist()
    picked = [log_probabilities[i - 1, ids.index(int(batch.token_ids[i]))] for i in counted(batch, ids)]
    (-torch.stack(picked).sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name, rtol=1e-3, atol=1e-4)


def test_the_distribution_is_the_targets_over_the_draft_vocabulary(tiny: Any) -> None:
    model, batch, vocabulary = tiny.model(), tiny.batch(), tiny.vocabulary(23)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(batch.token_ids), 2, 12, generator=generator)
    rows, norm = torch.randn(23, 12, generator=generator), torch.rand(12, generator=generator)
    objective = Distribution(vocabulary, Teacher(norm, rows, 1e-5), teacher_column=1)
    losses = objective.losses(model, replace(batch, features=states))

    def target(state: Tensor) -> Tensor:
        normalized = state / (state.square().mean() + 1e-5).sqrt() * norm
        return (rows @ normalized).softmax(-1)

    log_probabilities = (model.states(batch) @ model.head[vocabulary.ids].t()).log_softmax(-1)
    tokens = counted(batch, vocabulary.ids.tolist())
    wanted = [-(target(states[index - 1, 1]) * log_probabilities[index - 1]).sum() for index in tokens]
    torch.testing.assert_close(losses.total, torch.stack(wanted).sum())
    assert losses.count == len(tokens)


def test_places_are_where_ids_stand(tiny: Any) -> None:
    vocabulary = tiny.vocabulary(23)
    for token in range(tiny.vocab_size):
        place = int(vocabulary.places[token])
        assert place == (vocabulary.ids.tolist().index(token) if token in vocabulary.ids else -1)
