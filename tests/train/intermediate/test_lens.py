"""The fitted head, against what it must be where the answer is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.train.intermediate.conftest import Text
from train.elementwise import rms_normalize
from train.intermediate.language_model import LanguageModel
from train.intermediate.lens import fit_lens
from train.torch_features import TorchFeatures


class Lens:
    """A fit of `model` to the states of `target`, and what it read."""

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel, texts: Sequence[Text], **changes: Any) -> None:
        norm, eps = target.model.norm.weight.detach(), target.config.rms_norm_eps
        source = TorchFeatures(target, (target.config.num_hidden_layers,))
        self.num_read = 0
        self.matrix = fit_lens(
            LanguageModel(model),
            texts,
            source,
            lambda states: rms_normalize(states, eps) * norm,
            **{"num_tokens": 10**6, "seed": 0, "on_tokens": self._count, **changes},
        )

    def _count(self, tokens: int) -> None:
        self.num_read += tokens


@pytest.fixture
def texts(tiny: Any) -> list[Text]:
    rng = np.random.default_rng(3)
    return [Text(rng.integers(0, tiny.vocab_size, 40).astype(np.int32), ((1, 40),)) for _ in range(12)]


def test_a_model_that_is_the_target_keeps_its_head(tiny: Any, texts: list[Text]) -> None:
    lens = Lens(tiny.lm(), tiny.lm(), texts)
    torch.testing.assert_close(lens.matrix, torch.eye(len(lens.matrix)), atol=0.01, rtol=0)


def test_the_fit_is_ridge_regression_on_all_tokens_but_the_first(tiny: Any, texts: list[Text]) -> None:
    model, target = tiny.lm(seed=1, hidden_size=36, num_hidden_layers=2), tiny.lm()
    lens = Lens(model, target, texts)
    assert lens.matrix.shape == (24, 36) and lens.num_read == 12 * 40
    ids = torch.tensor(np.stack([text.token_ids for text in texts]), dtype=torch.int64)
    with torch.no_grad():
        x = tiny.lm(seed=1, hidden_size=36, num_hidden_layers=2).model(ids).last_hidden_state[:, 1:].reshape(-1, 36)
        y = target.model(ids).last_hidden_state[:, 1:].reshape(-1, 24)
    penalty = torch.diag((1e-3 * x.double().square().sum(0)).sqrt())
    stacked = torch.cat([x.double(), penalty]), torch.cat([y.double(), torch.zeros(36, 24, dtype=torch.float64)])
    expected = torch.linalg.lstsq(*stacked).solution.t().float()
    torch.testing.assert_close(lens.matrix, expected, atol=1e-4, rtol=1e-3)


def test_no_more_is_read_than_asked_and_the_seed_decides_what(tiny: Any, texts: list[Text]) -> None:
    short = texts * 40  # more than one batch
    first, same, other = (Lens(tiny.lm(seed=1), tiny.lm(), short, num_tokens=100, seed=seed) for seed in (0, 0, 1))
    assert first.num_read <= 512 < 40 * len(short)
    assert torch.equal(first.matrix, same.matrix) and not torch.equal(first.matrix, other.matrix)
