"""A head's training that goes on from another head: what it takes from there, and whose head that must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_record import Owner
from deploy.formats.speculators import EagleDirectory
from pipeline.stages.eagle_training import _check_trim, _start_from
from train.eagle.head import EagleHead

OWNER = Owner("d" * 64, {}, "a" * 64, "0" * 64)


@pytest.fixture
def trained(write_head: Any, embedded_shape: ModelShape, tmp_path: Path) -> EagleDirectory:
    return EagleDirectory.open(write_head(tmp_path / "head"), embedded_shape)


def new_head(trained: EagleDirectory) -> EagleHead:
    """Of the same shape with twice as many draft tokens, and no embedding, which nothing here reads."""
    torch.manual_seed(1)
    return EagleHead(replace(trained.config, draft_vocab_size=8), torch.zeros(1, 1))


def test_it_has_the_weights_and_tells_where_they_are_from(trained: EagleDirectory, embedded_shape: ModelShape) -> None:
    head, target = new_head(trained), SimpleNamespace(shape=embedded_shape)
    told = _start_from(trained.path, head, target, OWNER, np.arange(8), "eagle")  # type: ignore[arg-type]
    assert told == {"content": "c" * 64, "tokens": 77}
    assert torch.equal(head.fc.weight, torch.from_numpy(trained.float32("fc.weight")))
    assert torch.equal(head.lm_head.weight[:4], torch.from_numpy(trained.float32("lm_head.weight")))
    assert torch.equal(head.lm_head.weight[4:], new_head(trained).lm_head.weight[4:])


def test_a_head_for_another_tokenizer_is_refused(trained: EagleDirectory, embedded_shape: ModelShape) -> None:
    target: Any = SimpleNamespace(shape=embedded_shape)
    other = replace(OWNER, tokenizer="b" * 64)
    message = r"trained for another tokenizer \(aaaa.*\(bbbb.*leave eagle_intermediate\.initial out"
    with pytest.raises(ValueError, match=message):
        _start_from(trained.path, new_head(trained), target, other, np.arange(8), "eagle_intermediate")


def test_a_size_without_room_for_the_end_tokens_is_refused_before_the_training() -> None:
    _check_trim([64, 2], [7, 9], "eagle")
    with pytest.raises(ValueError, match=r"^eagle\.vocabulary\.trim=\[64, 1\]: 1 cannot hold the 2 tokens that end"):
        _check_trim([64, 1], [7, 9, 9], "eagle")
