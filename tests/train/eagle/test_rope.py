"""Rotary tables against transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from train.eagle.rope import rope_tables

ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_tables_are_transformers(eagle: Any, rope: dict[str, Any]) -> None:
    shape = eagle.shape(rope_parameters=rope, max_position_embeddings=512, head_dim=8)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    positions = torch.tensor([0, 1, 5, 63, 64, 65, 200, 511])
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    found_cosine, found_sine = rope_tables(shape, positions)
    # transformers rounds its angles to float32.
    torch.testing.assert_close(found_cosine, cosine[0, :, :4], rtol=0, atol=1e-4)
    torch.testing.assert_close(found_sine, sine[0, :, :4], rtol=0, atol=1e-4)
