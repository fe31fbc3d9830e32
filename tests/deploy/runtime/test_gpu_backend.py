"""The GPU backend on CPU tensors, its operations in plain torch: against the reference, and against itself."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deploy.kernels.reference.model import ReferenceBackend  # noqa: E402
from deploy.runtime.backend import Forward, Row  # noqa: E402
from deploy.runtime.gpu_backend import GpuBackend  # noqa: E402
from deploy.runtime.gpu_model import Device  # noqa: E402
from deploy.runtime.gpu_ops import reference_ops  # noqa: E402

VOCABULARY = 263


def device(dtype=torch.bfloat16):
    return Device(torch.device("cpu"), dtype, reference_ops(), {"gpu": "none"})


def chain(tokens, start=0, sequence=0):
    return [Row(int(token), start + i, sequence, i - 1) for i, token in enumerate(tokens)]


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "changes", "packing"),
    [
        ("llama", {}, (4, 32, "asymmetric")),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, (4, 32, "minimum")),
        ("llama", {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 384}, (4, 128, "symmetric")),
        ("qwen2", {"tie_word_embeddings": False}, (8, 32, "asymmetric")),
        ("qwen2", {"num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}, (8, 32, "minimum")),
        ("qwen3", {"head_dim": 32}, (4, 32, "symmetric")),
        ("qwen3", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 10, "num_key_value_heads": 2}, None),
        ("mistral", {"num_key_value_heads": 6, "tie_word_embeddings": False}, (4, 32, "asymmetric")),
        ("mistral", {"head_dim": 128, "num_attention_heads": 5, "num_key_value_heads": 1}, None),
    ],
)
def test_logits_and_taps_are_near_the_references(tmp_path, tiny, model_type, changes, packing):
    config = tiny.config(model_type, **changes)
    path = tiny.model(tmp_path / "m", config, packing and tiny.Quantized(*packing), seed=5)
    backend, reference = GpuBackend(path, device()), ReferenceBackend(path, activations="bf16")
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config["vocab_size"], 75)
    for begin, end in ((0, 41), (41, 42), (42, 75)):
        rows = [Row(int(t), begin + i, 0, i - 1) for i, t in enumerate(tokens[begin:end])]
        found, expected = backend.forward(rows, taps=(0, 1, 2)), reference.forward(rows, taps=(0, 1, 2))
        spread = expected.logits.std()
        print(np.abs(found.logits - expected.logits).max() / spread, np.abs(found.logits - expected.logits).mean() / spread)
        backend.keep(0, range(len(rows)))
        reference.keep(0, range(len(rows)))
