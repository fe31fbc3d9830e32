import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deploy.formats.architectures import ModelShape
from deploy.kernels.rope import rope_frequencies, rope_tables

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default", "rope_theta": 1e5}, LLAMA3 | {"original_max_position_embeddings": 64}],
    ids=["default", "llama3"],
)
def test_the_tables_are_transformers_within_its_own_rounding(tiny, parameters):
    config = tiny.config(rope_parameters=parameters, head_dim=64, max_position_embeddings=512)
    shape = ModelShape.from_config(config)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config))
    assert np.allclose(rope_frequencies(shape), theirs.inv_freq.numpy(), rtol=3e-7)
    positions = np.array([0, 1, 2, 77, 300])
    cosine, sine = theirs(torch.zeros(1, 1, 64), torch.from_numpy(positions)[None])
    ours = rope_tables(shape, positions)
    assert np.allclose(ours[0], cosine[0, :, :32].numpy(), atol=1e-4)
    assert np.allclose(ours[1], sine[0, :, :32].numpy(), atol=1e-4)
