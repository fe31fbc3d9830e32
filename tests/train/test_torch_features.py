"""Hidden states from transformers: the right ones, whatever is padded to what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from train.torch_features import TorchFeatures


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 1, "vocab_size": 71, "max_position_embeddings": 64, "head_dim": 16}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **fields)).eval()


def sequences(*lengths):
    rng = np.random.default_rng(2)
    return [rng.integers(0, 71, length).astype(np.int32) for length in lengths]


def test_each_state_is_what_enters_the_layer_and_the_last_is_before_the_final_norm(model):
    (ids,) = sequences(11)
    (found,) = TorchFeatures(model, (0, 2, 3)).capture([ids])
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
        normed = model.model.norm(torch.from_numpy(found[:, 2]))
    assert found.shape == (11, 3, 32)
    assert found.dtype == np.float32
    assert np.array_equal(found[:, 0], theirs[0][0])
    assert np.array_equal(found[:, 1], theirs[2][0])
    assert np.allclose(normed, theirs[3][0], atol=1e-6)


@pytest.mark.parametrize("rows_per_call", [1, 30, 4096])
def test_a_sequences_states_do_not_depend_on_its_company(model, rows_per_call):
    several = sequences(5, 17, 1, 9)
    together = TorchFeatures(model, (1, 3), rows_per_call=rows_per_call).capture(several)
    for ids, found in zip(several, together, strict=True):
        (alone,) = TorchFeatures(model, (1, 3)).capture([ids])
        assert found.shape == (len(ids), 2, 32)
        assert np.allclose(found, alone, atol=1e-5)


def test_capturing_leaves_no_hook_behind(model):
    TorchFeatures(model, (0, 3)).capture(sequences(4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_the_model_lacks_is_refused(model):
    with pytest.raises(ValueError, match=r"feature layers \[0, 4\]: layer 4 is not in 0…3"):
        TorchFeatures(model, (0, 4))
