"""A head's training that goes on from another head: what it takes from there, and whose head that must be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord
from deploy.formats.speculators import write_eagle
from pipeline.stages.eagle_training import _start_from
from train.eagle.head import EagleHead

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)
NONE = Acceptance((0.0,), 1.0)


def new_head(seed: int, draft_size: int) -> EagleHead:
    torch.manual_seed(seed)
    config = EagleConfig.for_target(
        SHAPE,
        draft_vocab_size=draft_size,
        feature_layers=(1, 3, 5),
        norm_before_residual=True,
        num_drafted=4,
        embedding="reference",
    )
    return EagleHead(config, torch.randn(61, 24))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    head = new_head(0, 10)
    record = TrainingRecord(
        tokens=77, seconds=None, served=NONE, served_form="", plain=NONE, cost_ratio=0.0, mbsu=0.0, settings={}, data={}
    )
    weights = {name: values.detach().numpy() for name, values in head.named_parameters()}
    write_eagle(tmp_path, head.config, weights, np.arange(10), owner("a" * 64), record)
    return tmp_path


def owner(tokenizer: str) -> Owner:
    return Owner("c" * 64, {}, tokenizer, "0" * 64)


def test_it_has_the_weights_and_tells_where_they_are_from(trained: Path) -> None:
    target: Any = SimpleNamespace(shape=SHAPE)
    head = new_head(1, 20)
    told = _start_from(trained, head, target, owner("a" * 64), np.arange(20))
    assert told == {"content": "c" * 64, "tokens": 77}
    expected = new_head(0, 10)
    assert torch.equal(head.fc.weight, expected.fc.weight.bfloat16().float())
    assert torch.equal(head.lm_head.weight[:10], expected.lm_head.weight.bfloat16().float())
    assert torch.equal(head.lm_head.weight[10:], new_head(1, 20).lm_head.weight[10:])


def test_a_head_for_another_tokenizer_is_refused(trained: Path) -> None:
    target: Any = SimpleNamespace(shape=SHAPE)
    with pytest.raises(ValueError, match=r"trained for another tokenizer \(aaaa.*\(bbbb.*leave eagle\.initial out"):
        _start_from(trained, new_head(1, 20), target, owner("b" * 64), np.arange(20))
