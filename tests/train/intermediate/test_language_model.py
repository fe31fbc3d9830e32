"""Packed conversations against transformers' own forward pass of each alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from train import products
from train.intermediate.language_model import LanguageModel


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_each_packed_conversation_gets_the_states_that_it_has_alone(tiny: Any, model_type: str) -> None:
    changes = {"sliding_window": None} if model_type == "mistral" else {}
    alone = tiny.lm(model_type, **changes)
    packed = LanguageModel(tiny.lm(model_type, **changes))
    batch = tiny.batch()
    found = packed.states(batch)
    for begin, end in pairwise(batch.starts.tolist()):
        expected = alone.model(input_ids=batch.token_ids[None, begin:end]).last_hidden_state[0]
        torch.testing.assert_close(found[begin:end], expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_fill_up_a_batch_for_bfloat16_change_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a repeating number of rows; nobody reads the added ones, and nothing is learnt from them."""
    batch = next(each for each in map(tiny.batch, range(9)) if len(each.token_ids) % products.ROW_MULTIPLE)
    found = []
    for multiple in (1, products.ROW_MULTIPLE):
        monkeypatch.setattr(products, "ROW_MULTIPLE", multiple)
        model = tiny.model()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.states(batch)
            (states.float() @ model.head.float().t()).square().sum().backward()
        assert len(states) == len(batch.token_ids)
        found.append([states.detach().float(), *(parameter.grad for parameter in model.parameters())])
    for plain, filled in zip(*found, strict=True):
        assert torch.linalg.vector_norm(filled - plain) <= 0.02 * torch.linalg.vector_norm(plain)


def test_the_head_gives_the_models_own_logits(tiny: Any) -> None:
    for tied in (True, False):
        model = tiny.model(tie_word_embeddings=tied)
        batch = tiny.batch()
        expected = tiny.lm(tie_word_embeddings=tied)(input_ids=batch.token_ids[None, :19]).logits[0]
        torch.testing.assert_close(model.states(batch)[:19] @ model.head.t(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_ends_that_are_not_trained_get_no_gradient_and_everything_else_does(tiny: Any, tied: bool) -> None:
    model = LanguageModel(tiny.lm(tie_word_embeddings=tied), trains_ends=False)
    (model.states(tiny.batch()) @ model.head.t()).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"lm.model.embed_tokens.weight"} | (set() if tied else {"lm.lm_head.weight"})


def test_recomputed_activations_give_the_same_gradients(tiny: Any) -> None:
    gradients = []
    for recomputes in (False, True):
        model = tiny.model().train()
        if recomputes:
            model.gradient_checkpointing_enable()
        model.states(tiny.batch()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
