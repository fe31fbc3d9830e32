"""Tiny heads, teachers and batches with random contents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from train.distillation import Teacher
from train.eagle.head import EagleHead
from train.eagle.objective import TrainingTimeTest
from train.loop.batches import Batch


@dataclass(frozen=True)
class TinyConversation:
    token_ids: Any
    spans: tuple[tuple[int, int], ...]
    temperature: float = 0.0
    index: int = 0

    def loss_mask(self) -> Any:
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for begin, end in self.spans:
            mask[begin:end] = True
        return mask


def tiny_shape(**changes: Any) -> ModelShape:
    config = {
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    }
    return ModelShape.from_config(config | changes)


def tiny_head(
    *,
    draft_size: int = 37,
    norm_before_residual: bool = False,
    feature_layers: Sequence[int] = (1, 3, 5),
    seed: int = 0,
) -> EagleHead:
    """A head whose norms and weights are large enough for every part of it to matter."""
    shape = tiny_shape()
    config = EagleConfig.for_target(
        shape,
        draft_vocab_size=draft_size,
        feature_layers=tuple(feature_layers),
        norm_before_residual=norm_before_residual,
        num_drafted=4,
        embedding="reference",
    )
    generator = torch.Generator().manual_seed(seed)
    head = EagleHead(config, torch.randn(shape.vocab_size, shape.hidden_size, generator=generator))
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.3 * noise if parameter.ndim == 1 else 0.25 * noise)
    return head


def tiny_conversations(seed: int, spans: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int]) -> list[Any]:
    rng = np.random.default_rng(seed)
    vocab_size = tiny_shape().vocab_size
    return [
        TinyConversation(rng.integers(0, vocab_size, length).astype(np.int32), tuple(parts), index=index)
        for index, (parts, length) in enumerate(zip(spans, lengths, strict=True))
    ]


def pack_conversations(conversations: Sequence[Any], features: Sequence[Any] | None = None) -> Batch:
    lengths = [len(conversation.token_ids) for conversation in conversations]
    return Batch(
        token_ids=torch.from_numpy(np.concatenate([c.token_ids for c in conversations]).astype(np.int64)),
        loss_mask=torch.from_numpy(np.concatenate([c.loss_mask() for c in conversations])),
        position=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        starts=torch.from_numpy(np.cumsum([0, *lengths])),
        features=None if features is None else torch.from_numpy(np.concatenate(list(features))),
    )


def random_batch(seed: int = 0, num_features: int = 4) -> Batch:
    """Odd lengths, a conversation of two turns, one that is written to its end, one with nothing to draft."""
    spans = [[(5, 17)], [(3, 9), (14, 22)], [(4, 4)], [(1, 11)]]
    conversations = tiny_conversations(seed, spans, [19, 23, 7, 11])
    rng = np.random.default_rng(seed + 1)
    hidden = tiny_shape().hidden_size
    features = [rng.standard_normal((len(c.token_ids), num_features, hidden)).astype(np.float32) for c in conversations]
    return pack_conversations(conversations, features)


def tiny_objective(head: EagleHead, *, num_steps: int = 4, decay: float = 0.8, seed: int = 5) -> TrainingTimeTest:
    shape = head.config.layer
    generator = torch.Generator().manual_seed(seed)
    norm = 1.0 + 0.3 * torch.randn(shape.hidden_size, generator=generator)
    rows = torch.randn(head.config.draft_vocab_size, shape.hidden_size, generator=generator)
    draft_ids = torch.randperm(shape.vocab_size, generator=generator)[: head.config.draft_vocab_size]
    in_vocabulary = torch.zeros(shape.vocab_size, dtype=torch.bool)
    in_vocabulary[draft_ids] = True
    num_features = len(head.config.feature_layers)
    return TrainingTimeTest(
        teacher=Teacher(norm, rows, shape.rms_norm_eps),
        in_vocabulary=in_vocabulary,
        num_steps=num_steps,
        decay=decay,
        feature_columns=tuple(range(num_features)),
        teacher_column=num_features,
    )


class Eagle:
    """Makers of tiny things."""

    shape = staticmethod(tiny_shape)
    head = staticmethod(tiny_head)
    conversations = staticmethod(tiny_conversations)
    pack = staticmethod(pack_conversations)
    batch = staticmethod(random_batch)
    objective = staticmethod(tiny_objective)


@pytest.fixture(scope="session")
def eagle() -> Eagle:
    return Eagle()
