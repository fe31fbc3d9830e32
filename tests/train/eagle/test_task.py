"""A head made for a real (tiny) target, trained by the loop."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.formats.eagle_config import EagleConfig
from deploy.formats.model_dir import ModelDirectory
from train.distillation import Teacher
from train.eagle.head import EagleHead
from train.eagle.initial import make_teacher, start_from_target, target_embedding
from train.eagle.objective import TrainingTimeTest
from train.eagle.rollout import HeldOut
from train.eagle.task import EagleTask
from train.loop.loop import train
from train.loop.settings import TrainSettings
from train.torch_features import TorchFeatures

VOCAB = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Weights so large that what it says is far from random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def target(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    path = tmp_path_factory.mktemp("target")
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "llama"
    return ModelDirectory.open(path)


@torch.no_grad()
def greedy_texts(eagle: Any, model: LlamaForCausalLM, count: int, seed: int) -> list[Any]:
    """Conversations that the model really wrote: 5 random tokens, then 30 of its own."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, VOCAB, (count, 5), generator=generator)
    written = model.generate(prompts, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    texts = eagle.conversations(0, [[(5, 35)]] * count, [35] * count)
    return [
        replace(text, token_ids=ids.numpy().astype(np.int32), index=index)
        for index, (text, ids) in enumerate(zip(texts, written, strict=True))
    ]


@dataclass(frozen=True)
class Made:
    head: EagleHead
    teacher: Teacher
    source: TorchFeatures
    held_out: HeldOut
    task: EagleTask


def make(
    eagle: Any, target: ModelDirectory, model: LlamaForCausalLM, feature_layers: Sequence[int] = (1, 3, 5)
) -> Made:
    """A head that starts from the target, with texts of the target to be judged by."""
    config = EagleConfig.for_target(
        target.shape,
        draft_vocab_size=50,
        feature_layers=tuple(feature_layers),
        norm_before_residual=True,
        num_drafted=4,
        embedding="reference",
    )
    draft_ids = torch.arange(50)
    head = EagleHead(config, target_embedding(target))
    start_from_target(head, target, draft_ids)
    layers = sorted({*feature_layers, 6})
    source = TorchFeatures(model, layers)
    columns = tuple(layers.index(layer) for layer in feature_layers)
    held_out = HeldOut(greedy_texts(eagle, model, 8, seed=1), source, columns)
    teacher = make_teacher(target, draft_ids)
    objective = TrainingTimeTest(teacher, torch.arange(VOCAB) < 50, 3, 0.9, columns, len(layers) - 1)
    return Made(head, teacher, source, held_out, EagleTask(head, objective, held_out, draft_ids, 4))


@pytest.mark.parametrize("feature_layers", [(1, 3, 5), (6,)], ids=["three states", "the last state"])
def test_training_by_the_loop_raises_what_is_accepted(
    eagle: Any, target: ModelDirectory, model: LlamaForCausalLM, tmp_path: Path, feature_layers: tuple[int, ...]
) -> None:
    # On the texts that are replayed: a tiny random model says nothing that could be learned from others.
    torch.manual_seed(0)
    made = make(eagle, target, model, feature_layers)
    before = made.task.evaluate(made.head)["tau"]
    settings = TrainSettings(learning_rate=1e-2, max_epochs=60, tokens_per_batch=280, max_length=64, evaluate_every=1.0)
    result = train(
        made.task,
        greedy_texts(eagle, model, 8, seed=1),
        settings,
        tmp_path,
        seed=0,
        features=made.source,
        on_log=lambda _step, _metrics: None,
        on_progress=lambda _share, _seconds: None,
    )
    assert result.best.metrics["tau"] > before + 0.5


def test_the_teachers_distribution_is_the_models_own_over_the_draft_vocabulary(
    eagle: Any, target: ModelDirectory, model: LlamaForCausalLM
) -> None:
    made = make(eagle, target, model)
    ids = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(3))
    (features,) = made.source.capture([ids[0].numpy().astype(np.int32)])
    with torch.no_grad():
        found = made.teacher.logits(torch.from_numpy(features[:, -1]))
        expected = model(ids).logits[0, :, :50]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_is_the_replay_of_the_held_out_texts(
    eagle: Any, target: ModelDirectory, model: LlamaForCausalLM
) -> None:
    made = make(eagle, target, model)
    assert made.task.evaluate(made.head) == made.held_out.replay(made.head, torch.arange(50), 4).metrics()


def test_a_new_head_has_the_targets_rows_and_passes_the_last_state_through(
    eagle: Any, target: ModelDirectory, model: LlamaForCausalLM
) -> None:
    head = make(eagle, target, model).head
    torch.testing.assert_close(head.lm_head.weight.detach(), model.lm_head.weight[:50].detach())
    states = torch.randn(3, 3 * 24)
    torch.testing.assert_close(linear(states, head.fc.weight).detach(), states[:, -24:])
