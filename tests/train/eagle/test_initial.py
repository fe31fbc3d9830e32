"""A head that goes on from another, through the files that the other was written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord
from deploy.formats.speculators import EagleDirectory, write_eagle
from train.eagle.initial import start_from_head

OWNER = Owner("0" * 64, {}, "0" * 64, "0" * 64)
NONE = Acceptance((0.0,), 1.0)
RECORD = TrainingRecord(
    tokens=0, seconds=None, served=NONE, served_form="", plain=NONE, cost_ratio=0.0, mbsu=0.0, settings={}, data={}
)


@pytest.fixture
def trained(eagle: Any, tmp_path: Path) -> EagleDirectory:
    """A head of 37 draft tokens of 61."""
    head = eagle.head(draft_size=37)
    ids = torch.randperm(61, generator=torch.Generator().manual_seed(1))[:37].sort().values
    weights = {name: values.detach().numpy() for name, values in head.named_parameters()}
    write_eagle(tmp_path / "head", head.config, weights, ids.numpy(), OWNER, RECORD)
    return EagleDirectory.open(tmp_path / "head", eagle.shape())


@pytest.mark.parametrize("draft_size", [20, 37, 61])
def test_it_has_the_others_weights_and_its_rows_of_the_tokens_that_both_draft(
    eagle: Any, trained: EagleDirectory, draft_size: int
) -> None:
    head = eagle.head(draft_size=draft_size, seed=5)
    ids = torch.randperm(61, generator=torch.Generator().manual_seed(2))[:draft_size].sort().values
    before, weights = head.lm_head.weight.detach().clone(), trained.weights()
    start_from_head(head, trained, ids)
    for name, values in head.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(values, torch.from_numpy(weights[name])), name
    theirs = trained.draft_ids.tolist()
    shared = 0
    for row, token in enumerate(ids.tolist()):
        if token in theirs:
            expected = torch.from_numpy(weights["lm_head.weight"][theirs.index(token)])
            shared += 1
        else:
            expected = before[row]
        assert torch.equal(head.lm_head.weight[row], expected), token
    assert 0 < shared <= min(draft_size, 37)
