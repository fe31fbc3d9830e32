"""Where a model starts, against transformers' own models and numpy's SVD."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.formats.model_dir import ModelDirectory
from train.intermediate.initial import from_layers, from_noise, project, write_model
from train.intermediate.shapes import Sizes, layers_config, random_config

SIZES = Sizes(2, 16, 40, 2, 1, 16, ties_embeddings=True, projects_embedding=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_and_ends_are_the_sources(tmp_path: Path, tiny: Any, model_type: str, tied: bool) -> None:
    whole = tiny.lm(model_type, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path)
    kept = (0, 3)
    with ModelDirectory.open(tmp_path) as source:
        made = from_layers(source, kept, tiny.vocab_size)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[layer] for layer in kept])
    for place, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = place
    whole.config.num_hidden_layers = len(kept)
    ids = torch.arange(13)[None]
    torch.testing.assert_close(made(input_ids=ids).logits, whole(input_ids=ids, use_cache=False).logits)


def test_all_layers_are_the_model_as_it_is(tmp_path: Path, tiny: Any) -> None:
    with tiny.directory(tmp_path) as source:
        made = from_layers(source, range(5), tiny.vocab_size)
    ids = torch.arange(13)[None]
    torch.testing.assert_close(made(input_ids=ids).logits, tiny.lm()(input_ids=ids).logits)


@pytest.mark.parametrize("vocab_size", [57, 70])
def test_a_vocabulary_filled_up_to_another_size_keeps_the_rows_of_its_tokens(
    tmp_path: Path, tiny: Any, vocab_size: int
) -> None:
    with tiny.directory(tmp_path, tie_word_embeddings=False) as source:
        made = from_layers(source, (0,), vocab_size)
    common = min(vocab_size, tiny.vocab_size)
    for ours, theirs in zip(
        (made.get_input_embeddings(), made.get_output_embeddings()),
        (tiny.lm(tie_word_embeddings=False).get_input_embeddings(), tiny.lm(tie_word_embeddings=False).lm_head),
        strict=True,
    ):
        assert torch.equal(ours.weight[:common], theirs.weight[:common])
        assert not ours.weight[common:].any()


def test_a_projection_keeps_inner_products_as_well_as_the_best_of_its_width() -> None:
    matrix = np.random.default_rng(0).standard_normal((29, 11)).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    found = project(torch.from_numpy(matrix), 4).numpy()
    error = np.linalg.norm(matrix @ matrix.T - found @ found.T)
    assert error == pytest.approx(np.linalg.norm(values[4:] ** 2), rel=1e-4)
    wide = project(torch.from_numpy(matrix), 14).numpy()
    np.testing.assert_allclose(wide @ wide.T, matrix @ matrix.T, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_noise_is_the_generators_and_the_embedding_the_targets(tmp_path: Path, tiny: Any, tied: bool) -> None:
    sizes = Sizes(2, 16, 40, 2, 1, 16, ties_embeddings=tied, projects_embedding=True)
    with tiny.directory(tmp_path, tie_word_embeddings=False) as target:
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(from_noise(target, sizes))
        embedding = project(torch.from_numpy(target.float32("model.embed_tokens.weight").copy()), 16)
        head = project(torch.from_numpy(target.float32("lm_head.weight").copy()), 16)
    assert torch.equal(made[0].get_input_embeddings().weight, embedding)
    assert torch.equal(made[0].get_output_embeddings().weight, embedding if tied else head)
    first, second, third = (model.model.layers[0].mlp.up_proj.weight for model in made)
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_loads_elsewhere_with_the_same_weights(tmp_path: Path, tiny: Any, tied: bool) -> None:
    with tiny.directory(tmp_path / "source", tie_word_embeddings=tied) as source:
        lm = from_layers(source, (1, 2), tiny.vocab_size)
        config = layers_config(source.config, 2, tiny.vocab_size)
    for name in ("first", "second"):
        write_model(lm, config, tmp_path / name)
    ids = torch.arange(13)[None]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(read(input_ids=ids).logits, lm(input_ids=ids).logits)
    with ModelDirectory.open(tmp_path / "first") as files:
        assert files.shape.num_layers == 2 and files.shape.tied_embeddings == tied
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_random_model_is_written_too(tmp_path: Path, tiny: Any) -> None:
    with tiny.directory(tmp_path / "target", "qwen2") as target:
        lm = from_noise(target, SIZES)
        write_model(lm, random_config(target.config, SIZES), tmp_path / "made")
    ids = torch.arange(13)[None]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(read(input_ids=ids).logits, lm(input_ids=ids).logits)
