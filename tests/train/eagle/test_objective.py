"""The loss and its gradients against a padded implementation in plain torch, and what the loop relies on."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.eagle_plain import PlainBatch, PlainEagle, plain_loss
from train.chains import find_chains
from train.eagle.head import EagleHead
from train.eagle.objective import TrainingTimeTest, read_columns
from train.loop.batches import Batch


def plain_gradients(
    head: EagleHead, objective: TrainingTimeTest, batch: Batch, target_norm: nn.RMSNorm, target_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    plain = PlainEagle(head.config, head.embed_tokens.weight)
    plain.load_state_dict(head.state_dict())
    total, count = plain_loss(
        plain,
        PlainBatch(batch),
        target_norm=target_norm,
        target_rows=target_rows,
        in_vocabulary=objective.in_vocabulary,
        num_steps=objective.num_steps,
        decay=objective.decay,
    )
    total.backward()
    return total, count, {name: parameter.grad for name, parameter in plain.named_parameters()}


def gradients(head: EagleHead) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in head.named_parameters()}


def unit_norm(head: EagleHead) -> nn.RMSNorm:
    return nn.RMSNorm(head.config.layer.hidden_size, head.config.layer.rms_norm_eps)


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("feature_layers", [(1, 3, 5), (6,)])
def test_loss_and_gradients_are_those_of_a_padded_implementation_in_plain_torch(
    eagle: Any, norm_before_residual: bool, num_steps: int, feature_layers: tuple[int, ...]
) -> None:
    head = eagle.head(norm_before_residual=norm_before_residual, feature_layers=feature_layers, seed=num_steps)
    objective = eagle.objective(head, num_steps=num_steps)
    batch = eagle.batch(seed=num_steps, num_features=len(feature_layers) + 1)
    losses = objective.losses(head, batch)
    losses.total.backward()
    # Teacher.rows holds the final norm's weight already.
    total, count, expected = plain_gradients(head, objective, batch, unit_norm(head), objective.teacher.rows)
    assert losses.count == count
    torch.testing.assert_close(losses.total, total, rtol=1e-5, atol=1e-4)
    found = gradients(head)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-4 * float(gradient.abs().max()), msg=name)


def test_drafts_of_tokens_outside_the_draft_vocabulary_are_left_out_and_counted(eagle: Any) -> None:
    head, batch = eagle.head(), eagle.batch()
    objective = eagle.objective(head)
    chains = find_chains(batch, objective.num_steps)
    losses = objective.losses(head, batch)
    drafted = [
        int(batch.token_ids[row + 2 + step])
        for step, written in enumerate(chains.drafts_written)
        for row in chains.rows[written].tolist()
    ]
    inside = [token for token in drafted if objective.in_vocabulary[token]]
    assert 0 < len(inside) < len(drafted)
    assert losses.count == len(inside)
    assert losses.metrics["outside_vocabulary"] == len(drafted) - len(inside)


def test_a_batch_with_nothing_to_draft_gives_zero_loss_and_a_gradient_for_every_parameter(eagle: Any) -> None:
    head = eagle.head()
    features = [np.zeros((6, 4, 24), np.float32)]
    batch = eagle.pack(eagle.conversations(0, [[(1, 2)]], [6]), features)
    losses = eagle.objective(head).losses(head, batch)
    losses.total.backward()
    assert (losses.total, losses.count) == (0, 0)
    assert all(not gradient.any() for gradient in gradients(head).values())


def test_conversations_do_not_see_each_other(eagle: Any) -> None:
    """The loss of a packed batch is the sum over its conversations alone."""
    head, batch = eagle.head(), eagle.batch()
    objective = eagle.objective(head)
    starts = batch.starts.tolist()
    alone = [objective.losses(head, part(batch, slice(begin, end))).total for begin, end in pairwise(starts)]
    torch.testing.assert_close(objective.losses(head, batch).total, torch.stack(alone).sum())


def part(batch: Batch, tokens: slice) -> Batch:
    return Batch(
        token_ids=batch.token_ids[tokens],
        loss_mask=batch.loss_mask[tokens],
        position=batch.position[tokens],
        starts=torch.tensor([0, tokens.stop - tokens.start]),
        features=batch.features[tokens],
    )


def test_recomputed_activations_give_the_same_gradients(eagle: Any) -> None:
    batch = eagle.batch()
    found = []
    for recomputes in (False, True):
        head = eagle.head()
        if recomputes:
            head.gradient_checkpointing_enable()
        eagle.objective(head).losses(head, batch).total.backward()
        found.append(gradients(head))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_bfloat16_autocast_stays_near_float32(eagle: Any) -> None:
    batch = eagle.batch()
    totals, directions = [], []
    for enabled in (False, True):
        head = eagle.head()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = eagle.objective(head).losses(head, batch)
        losses.total.backward()
        assert losses.total.dtype == torch.float32
        totals.append(losses.total)
        directions.append(torch.cat([gradient.flatten() for gradient in gradients(head).values()]))
    torch.testing.assert_close(totals[1], totals[0], rtol=0.05, atol=0)
    assert torch.cosine_similarity(directions[0], directions[1], dim=0) > 0.95


def test_features_that_the_head_does_not_read_in_order_are_picked_by_column(eagle: Any) -> None:
    features = torch.randn(3, 4, 2)
    assert torch.equal(read_columns(features, (3, 0)), torch.cat([features[:, 3], features[:, 0]], 1))
    assert torch.equal(read_columns(features, (1, 2)), torch.cat([features[:, 1], features[:, 2]], 1))
