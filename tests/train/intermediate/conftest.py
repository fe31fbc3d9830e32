"""Tiny language models and texts with random contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deploy.formats.model_dir import ModelDirectory
from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import DraftVocabulary
from train.loop.batches import Batch
from train.replay import text_batch

VOCAB = 61


@dataclass(frozen=True)
class Text:
    token_ids: Any
    spans: tuple[tuple[int, int], ...]
    temperature: float = 0.0

    def loss_mask(self) -> Any:
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for begin, end in self.spans:
            mask[begin:end] = True
        return mask


def tiny_lm(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Weights so large that what it says is far from random."""
    fields = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(fields | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_texts(
    seed: int, spans: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int], num_different: int = VOCAB
) -> list[Text]:
    rng = np.random.default_rng(seed)
    return [
        Text(rng.integers(0, num_different, length).astype(np.int32), tuple(parts))
        for parts, length in zip(spans, lengths, strict=True)
    ]


def odd_texts(seed: int = 0, num_different: int = VOCAB) -> list[Text]:
    """Odd lengths, two turns, one that is a response from its first token, one with nothing to learn."""
    spans = [[(5, 17)], [(3, 9), (14, 22)], [(4, 4)], [(0, 11)]]
    return tiny_texts(seed, spans, [19, 23, 7, 11], num_different)


class Tiny:
    """Makers of tiny things."""

    vocab_size = VOCAB
    Text = Text
    lm = staticmethod(tiny_lm)
    texts = staticmethod(tiny_texts)
    odd_texts = staticmethod(odd_texts)

    @staticmethod
    def model(model_type: str = "llama", **changes: Any) -> LanguageModel:
        return LanguageModel(tiny_lm(model_type, **changes))

    @staticmethod
    def batch(seed: int = 0) -> Batch:
        return text_batch(odd_texts(seed))

    @staticmethod
    def vocabulary(size: int = VOCAB, seed: int = 3) -> DraftVocabulary:
        ids = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:size])
        return DraftVocabulary.of(torch.from_numpy(ids), VOCAB)

    @staticmethod
    def directory(path: Path, model_type: str = "llama", **changes: Any) -> ModelDirectory:
        tiny_lm(model_type, **changes).save_pretrained(path)
        return ModelDirectory.open(path)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
