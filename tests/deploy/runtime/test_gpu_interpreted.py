"""The whole GPU backend with its Triton kernels: on the GPU where there is one, else in Triton's interpreter.

Interpreted, rows of more than 16 a call add in another order (numpy's), so equal bits are asked of fewer.
"""

import numpy as np
import pytest
import torch

from deploy.formats.bundle import Bundle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.modes import DraftOptions
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from tests.deploy.runtime.gpu_devices import (
    assert_near,
    assert_row_scaled_layers_equal_the_reference,
    kernel_device,
    pretend_gpu,
)
from tests.deploy.runtime.rows import (
    VOCABULARY,
    chain,
    decode_path,
    fill,
    path_to,
    random_tree,
)

needs_time = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.slow
"""Interpreted, these take minutes; on a GPU seconds."""


def test_a_tree_behind_a_text_is_near_the_reference_and_equals_its_paths_alone(tmp_path, tiny):
    """The smallest of models, with QK norm and grouped queries."""
    config = tiny.config("qwen3", num_hidden_layers=1, intermediate_size=64, hidden_size=64, num_attention_heads=4)
    path = tiny.model(tmp_path / "m", config, tiny.Quantized())
    backend, reference = GpuBackend.open(path, kernel_device()), ReferenceBackend(path, activations="bf16")
    context = [5, 6, 7]
    rows = [Row(1, 3), Row(2, 3), Row(3, 4, 0, 1)]
    found = []
    for each in (backend, reference):
        fill(each, context)
        found.append(each.forward(rows).logits)
    assert_near(*found)
    np.testing.assert_array_equal(decode_path(backend, context, [2, 3], 1), found[0][[1, 2]])


def test_layers_that_quantize_their_inputs_are_the_reference_and_a_tree_its_paths(tmp_path, tiny, monkeypatch):
    """One layer with flattened inputs, whole rows and groups of weights."""
    kinds = {
        pattern.replace("layers.0.", ""): kind for pattern, kind in tiny.MIXED.items() if "layers.1" not in pattern
    }
    config = tiny.config("qwen2", num_hidden_layers=1, intermediate_size=64, hidden_size=64, num_attention_heads=4)
    path = tiny.model(tmp_path / "m", config, kinds)
    backend = GpuBackend.open(path, kernel_device())
    context, rows = [5, 6, 7], [Row(1, 3), Row(2, 3), Row(3, 4, 0, 1)]
    fill(backend, context)
    assert assert_row_scaled_layers_equal_the_reference(backend, path, rows, monkeypatch) == (2, 2)
    logits = backend.forward(rows).logits
    np.testing.assert_array_equal(decode_path(backend, context, [2, 3], 1), logits[[1, 2]])


MODELS = [
    ("llama", {"tie_word_embeddings": False}, (4, 32, "asymmetric"), torch.bfloat16),
    ("qwen2", {}, (4, 32, "minimum"), torch.float16),
    ("mistral", {"num_hidden_layers": 1, "num_key_value_heads": 6}, None, torch.bfloat16),
]


@needs_time
@pytest.mark.parametrize(("model_type", "changes", "packing", "dtype"), MODELS)
def test_all_architectures_are_near_the_reference(tmp_path, tiny, model_type, changes, packing, dtype):
    path = tiny.model(tmp_path / "m", tiny.config(model_type, **changes), packing and tiny.Quantized(*packing), seed=5)
    form = "bf16" if dtype == torch.bfloat16 else "float32"
    backend, reference = GpuBackend.open(path, kernel_device(dtype)), ReferenceBackend(path, activations=form)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCABULARY, 21)
    tree = random_tree(rng, 9, 21)
    for rows in (chain(tokens), tree):
        found, expected = (each.forward(rows, taps=[1]) for each in (backend, reference))
        assert_near(found.logits, expected.logits)
        if rows is not tree:
            for each in (backend, reference):
                each.keep(0, range(21))


@needs_time
def test_a_row_is_the_same_in_every_bucket_and_a_tree_is_its_paths(tmp_path, tiny):
    backend = GpuBackend.open(
        tiny.model(tmp_path / "m", tiny.config("qwen3", num_hidden_layers=1), tiny.Quantized()), kernel_device()
    )
    rng = np.random.default_rng(2)
    context = rng.integers(0, VOCABULARY, 14)
    counts = (1, 2, 3, 8, 13, 16, 33, 64) if backend.device.torch_device.type == "cuda" else (1, 2, 3, 8, 13, 16)
    alone = decode_path(backend, context, [7])[0]
    fill(backend, context)
    for count in counts:
        others = [Row(int(rng.integers(VOCABULARY)), 14, 0) for _ in range(count - 1)]
        logits = backend.forward([*others, Row(7, 14)], logit_rows=[count - 1]).logits
        np.testing.assert_array_equal(logits[0], alone)
    rows = random_tree(rng, 12, 14)
    logits = backend.forward(rows).logits
    for leaf in (5, 11):
        path = path_to(rows, leaf)
        found = decode_path(backend, context, [rows[i].token for i in path], sequence=1)
        np.testing.assert_array_equal(logits[path], found)


SAMPLED = SamplingParams(0.9, top_p=0.95, repetition_penalty=1.1, seed=4)


@needs_time
@pytest.mark.parametrize(
    ("mode", "sampling"), [("chain", SAMPLED), ("eagle-tree", SAMPLED), ("cascade", SamplingParams())]
)
def test_a_modes_answers_are_plain_decodings(tmp_path, tiny, monkeypatch, mode, sampling):
    pretend_gpu(monkeypatch, kernel_device())
    bundle = Bundle.open(tiny.finish_hierarchy(tiny.hierarchy(tmp_path / "b", np.arange(0, 263, 3))))
    answers = []
    for name, drafts in (("plain", None), (mode, DraftOptions(depth=2))):
        session = Session.open(bundle, mode=name, drafts=drafts, backend="gpu")
        prompt = session.encode_raw("So and so")
        answers.append(session.generate(prompt, GenerationOptions(5, sampling)).token_ids)
    assert answers[0] == answers[1]
