"""The reference's EAGLE head against the head that is trained, in torch; and against itself."""

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_record import Owner
from deploy.formats.speculators import EagleDirectory
from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.linear import quantize_weights4
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from train.chains import find_chains
from train.eagle.head import EagleHead
from train.eagle.unroll import unroll
from train.loop.batches import Batch

OWNER = Owner("c" * 64, {"model.safetensors": "f" * 64}, "a" * 64, "b" * 64)
STEPS = 4
LENGTH = 23
HEADS = [
    {"feature_layers": (0, 1, 2), "norm_before_residual": True},
    {"feature_layers": (2,), "norm_before_residual": False},
    {"feature_layers": (1, 2), "norm_before_residual": True, "embedding": "copy"},
]


@pytest.fixture
def make(tmp_path, tiny):
    """make(tied, activations, **choices) → target, head directory and the head, all of random weights."""

    def build(tied=True, activations="int8", **choices):
        path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=tied), tiny.Quantized())
        target = ReferenceBackend(path, activations=activations)
        tiny.head(tmp_path / "h", ModelShape.from_config(tiny.config()), OWNER, seed=3, spread=0.15, **choices)
        head = EagleDirectory.open(tmp_path / "h", target.shape)
        return target, head, ReferenceEagle(head, target)

    return build


def random_text(head, seed=0):
    rng = np.random.default_rng(seed)
    width = head.config.layer.hidden_size * len(head.config.feature_layers)
    tokens = rng.integers(0, head.config.layer.vocab_size, LENGTH).tolist()
    return tokens, rng.standard_normal((LENGTH, width)).astype(np.float32)


def torch_logits(head, embedding, weights, tokens, features):
    """Of every chain at every step, [STEPS, chains, draft vocabulary], and the rows at which the chains begin."""
    model = EagleHead(head.config, torch.from_numpy(embedding))
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    batch = Batch(
        token_ids=torch.tensor(tokens),
        loss_mask=torch.ones(LENGTH, dtype=torch.bool),
        position=torch.arange(LENGTH),
        starts=torch.tensor([0, LENGTH]),
        features=torch.from_numpy(features),
    )
    chains = find_chains(batch, STEPS)
    with torch.no_grad():
        states = unroll(model, batch, torch.from_numpy(features), chains)
        return (states @ model.lm_head.weight.T).numpy(), chains.rows.tolist()


def reference_logits(reference, tokens, features, row):
    """Of the chain that begins at `row` of the text, teacher-forced: [steps, draft vocabulary]."""
    last = min(row + STEPS, LENGTH - 2)
    rows = [Row(tokens[t + 1], t, 0, t - 1) for t in range(last + 1)]
    return reference.forward(rows, features[: row + 1])[0][row : row + STEPS]


@pytest.mark.parametrize("choices", HEADS, ids=str)
def test_a_drafting_chain_is_what_was_trained(make, choices):
    """In float32, where only the cache's fp16 differs."""
    target, head, reference = make(tied=False, activations="float32", **choices)
    tokens, features = random_text(head)
    weights = {name: values for name, values in head.weights().items() if name != "embed_tokens.weight"}
    embedding = target.embed(np.arange(target.shape.vocab_size))
    if head.config.embedding == "copy":
        embedding = head.float32("embed_tokens.weight")
    expected, rows = torch_logits(head, embedding, weights, tokens, features)
    for chain, row in enumerate(rows):
        found = reference_logits(reference, tokens, features, row)
        np.testing.assert_allclose(found, expected[: len(found), chain], rtol=0.01, atol=0.01)


def test_the_served_form_is_close_to_served_weights(make):
    """4-bit weights in torch; the reference quantizes what they are multiplied with as well."""
    target, head, reference = make(**HEADS[0])
    tokens, features = random_text(head)

    weights = {
        name: quantize_weights4(values).dequantize() if values.ndim == 2 else values
        for name, values in head.weights().items()
    }
    embedding = target.embed(np.arange(target.shape.vocab_size))
    expected, rows = torch_logits(head, embedding, weights, tokens, features)
    errors = []
    for chain, row in enumerate(rows):
        found = reference_logits(reference, tokens, features, row)
        wanted = expected[: len(found), chain]
        errors += (np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).tolist()
    assert np.median(errors) < 0.06


def test_a_row_depends_on_its_path_alone(make):
    """A tree behind a text gives what its paths give alone."""
    _, head, reference = make(**HEADS[0])
    tokens, features = random_text(head)
    rng = np.random.default_rng(1)
    text = [Row(tokens[t + 1], t, 0, t - 1) for t in range(10)]
    rows = list(text)
    for _ in range(12):
        parent = int(rng.integers(9, len(rows)))
        rows.append(Row(int(rng.integers(263)), rows[parent].position + 1, 0, parent))
    logits, outputs = reference.forward(rows, features[:10])
    for leaf in (10, 15, 21):
        path, index = [], leaf
        while index >= 10:
            path.insert(0, index)
            index = rows[index].parent
        alone = text + [Row(rows[i].token, 10 + n, 0, 9 + n) for n, i in enumerate(path)]
        own_logits, own_outputs = reference.forward(alone, features[:10])
        np.testing.assert_array_equal(own_logits[10:], logits[path])
        np.testing.assert_array_equal(own_outputs[10:], outputs[path])


def test_a_draft_is_the_argmax_of_forwards(make):
    """Greedy, the plain way: forward, choose, append."""
    _, head, reference = make(**HEADS[1])
    tokens, features = random_text(head)
    found = reference.draft(0, tokens[1:], features[:-1], TreeLimits(depth=3), SamplingParams())
    assert reference.length(0) == LENGTH - 1
    reference.reset(0)
    rows = [Row(tokens[t + 1], t, 0, t - 1) for t in range(LENGTH - 1)]
    for token in found.tokens:
        logits, _ = reference.forward(rows, features[:-1])
        assert token == head.draft_ids[logits[-1].argmax()]
        rows.append(Row(token, len(rows), 0, len(rows) - 1))


def test_a_head_of_another_size_is_refused(make, tmp_path, tiny):
    _, head, _ = make()
    other = ReferenceBackend(tiny.model(tmp_path / "n", tiny.config(hidden_size=128), tiny.Quantized()))
    with pytest.raises(ValueError, match="hidden_size=96, but the target's is 128"):
        ReferenceEagle(head, other)
