"""What is sampled with drafts has the target's own distribution: χ² against exact probabilities."""

import numpy as np
import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.drafters.cascade import Cascade
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.drafters.model import LanguageModelDrafter
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from deploy.runtime.tree import TreeLimits

PROMPT = [4, 4, 7, 4, 4]  # ends as it begins, so that a lookup has something to say
TEMPERATURE, DRAWS = 0.7, 4000
CRITICAL = 3.29  # of a standard normal: one right drafter in two thousand is called wrong


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


@pytest.fixture(scope="module")
def second_token(bundle):
    """Exact probabilities of the second new token: over every first one, in float64."""
    model = CpuBackend(bundle.model())
    vocab_size = model.shape.vocab_size
    rows = [Row(token, i, 0, i - 1) for i, token in enumerate(PROMPT)]
    last = len(rows) - 1
    rows += [Row(token, len(PROMPT), 0, last) for token in range(vocab_size)]
    logits = model.forward(rows).logits[last:].astype(np.float64) / TEMPERATURE
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[1:][2] = 0.0  # the end token has no successor
    return shares[0] @ shares[1:]


def make_drafter(name, bundle, other):
    if name == "chain":
        return LanguageModelDrafter(other, TreeLimits(3, 1, 3))
    if name == "tree":
        return LanguageModelDrafter(other, TreeLimits(3, 4, 10))
    inner = LookupDrafter() if name == "cascade-lookup" else LanguageModelDrafter(other, TreeLimits(2, 2, 4))
    return Cascade(CpuBackend(bundle.model()), inner, min_draft_length=3)


@pytest.mark.parametrize("name", ["chain", "tree", "cascade", "cascade-lookup"])
def test_sampled_tokens_have_the_targets_distribution(tmp_path, tiny, bundle, second_token, name):
    other = CpuBackend(tiny.model(tmp_path / "o", tiny.config(num_hidden_layers=1), tiny.Quantized(), seed=0))
    session = Session.open(bundle)
    session.use(make_drafter(name, bundle, other))
    counts, drafted = np.zeros_like(second_token), 0
    for index in range(DRAWS):
        sampling = SamplingParams(TEMPERATURE, seed=11)
        found = session.generate(PROMPT, GenerationOptions(4, sampling, sample_index=index))
        drafted += found.speculation.drafted
        if len(found.token_ids) > 1:
            counts[found.token_ids[1]] += 1
    assert drafted > DRAWS
    total = counts.sum()
    expected = second_token / second_token.sum() * total
    order = np.argsort(-expected)
    is_large = expected[order] >= 5
    observed = np.append(counts[order][is_large], counts[order][~is_large].sum())
    hoped = np.append(expected[order][is_large], expected[order][~is_large].sum())
    statistic, freedom = float(((observed - hoped) ** 2 / hoped).sum()), len(hoped) - 1
    assert freedom >= 20
    # Wilson and Hilferty 1931: the cube root of χ²/n is nearly normal.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert abs(normal) < CRITICAL
