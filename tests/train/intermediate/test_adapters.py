"""Adapters start as nothing, learn alone, and leave a plain model that says what they said."""

from typing import Any

import torch

from train.intermediate.adapters import LAYERS, AdapterSizes, add_adapters, merge
from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import Tokens
from train.loop.model_state import trained_parameters


def adapted(tiny: Any) -> tuple[LanguageModel, Any]:
    model = LanguageModel(tiny.lm())
    return model, add_adapters(model.lm, AdapterSizes(rank=3, alpha=6))


def train(tiny: Any, model: LanguageModel) -> None:
    optimizer = torch.optim.Adam(trained_parameters(model).values(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        Tokens(tiny.vocabulary()).losses(model, tiny.batch()).total.backward()
        optimizer.step()


@torch.no_grad()
def test_new_adapters_change_nothing(tiny: Any) -> None:
    before = LanguageModel(tiny.lm()).states(tiny.batch())
    model, _ = adapted(tiny)
    assert torch.equal(model.states(tiny.batch()), before)


def test_only_adapters_are_trained_on_every_linear_layer(tiny: Any) -> None:
    model, _ = adapted(tiny)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    assert len(trained_parameters(model)) == 2 * len(LAYERS) * 5
    assert all("lora_" in name for name in trained_parameters(model))
    train(tiny, model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_merged_model_says_what_the_adapters_said(tiny: Any) -> None:
    model, adapters = adapted(tiny)
    train(tiny, model)
    with torch.no_grad():
        expected = model.states(tiny.batch())
        untrained = LanguageModel(tiny.lm()).states(tiny.batch())
        model.lm = merge(adapters)
        found = model.states(tiny.batch())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - untrained).abs().max() > 0.1
    assert set(model.lm.state_dict()) == set(tiny.lm().state_dict())
