"""A head's worth by size of vocabulary: the trimmed head in the file is the one that was measured."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from deploy.formats.speculators import tensor_contract
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.stages.eagle_measure import Measured, measure_sizes
from pipeline.stages.features import RuntimeFeatures
from pipeline.stages.served_form import served_bytes
from train.data.conversations import Conversation
from train.eagle.head import EagleHead
from train.eagle.initial import start_from_target, target_embedding
from train.eagle.rollout import HeldOut

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
TARGET_BYTES = 100_000


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    directory, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (0.3 * rng.standard_normal(size) + name.endswith("norm.weight")).astype(np.float32)
        for name, size in sizes.items()
    }
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return ModelDirectory.open(directory)


@pytest.fixture(scope="module")
def heldout(target: ModelDirectory) -> HeldOut:
    rng = np.random.default_rng(1)
    texts = [
        Conversation(rng.choice(8, 60, p=[0.3, 0.3, *[0.4 / 6] * 6]).astype(np.int32), ((9, 60),), 0.0, i)
        for i in range(3)
    ]
    return HeldOut(texts, RuntimeFeatures(CpuBackend(target, threads=1), (0, 1, 2)), (0, 1))


DRAFT_IDS = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 55], dtype=np.int64)
COUNTS = np.zeros(67, dtype=np.int64)
COUNTS[[0, 1, 5, 3, 8, 13]] = [60, 50, 40, 30, 20, 10]


def head_for(target: ModelDirectory, embedding: str = "reference") -> EagleHead:
    config = EagleConfig.for_target(
        target.shape,
        draft_vocab_size=len(DRAFT_IDS),
        feature_layers=(0, 1),
        norm_before_residual=True,
        num_drafted=3,
        embedding=embedding,
    )
    torch.manual_seed(3)
    head = EagleHead(config, target_embedding(target))
    start_from_target(head, target, torch.from_numpy(DRAFT_IDS))
    return head


def measure(head: EagleHead, target: ModelDirectory, heldout: HeldOut, sizes: list[int]) -> Measured:
    return measure_sizes(head, heldout, target, COUNTS, DRAFT_IDS, sizes, TARGET_BYTES)


def test_the_size_of_highest_mbsu_is_kept_with_its_rows(target: ModelDirectory, heldout: HeldOut) -> None:
    head = head_for(target)
    measured = measure(head, target, heldout, [4, 6])
    assert [choice.size for choice in measured.choices] == [10, 4, 6]
    best = max(measured.choices, key=lambda choice: choice.mbsu)
    assert (measured.config.draft_vocab_size, measured.mbsu) == (best.size, best.mbsu)
    expected = {10: DRAFT_IDS.tolist(), 6: [0, 1, 2, 3, 5, 8], 4: [0, 1, 2, 5]}[best.size]  # 2 ends a text
    assert measured.draft_ids.tolist() == expected
    rows = [DRAFT_IDS.tolist().index(token) for token in expected]
    assert np.array_equal(measured.weights["lm_head.weight"], head.lm_head.weight.detach().numpy()[rows])
    assert measured.cost_ratio == served_bytes(measured.weights) / TARGET_BYTES
    assert measured.mbsu == pytest.approx(measured.served.tau / (measured.cost_ratio * 3 + 1))


def test_the_trimmed_head_alone_accepts_what_was_measured(target: ModelDirectory, heldout: HeldOut) -> None:
    measured = measure(head_for(target), target, heldout, [4])
    alone = EagleHead(measured.config, target_embedding(target))
    alone.load_state_dict({name: torch.from_numpy(values) for name, values in measured.weights.items()})
    replay = heldout.replay(alone, torch.from_numpy(measured.draft_ids), 3)
    assert measured.plain.tau == replay.tau
    assert measured.plain.by_position == tuple(accepted / replay.rounds for accepted in replay.accepted)
    assert sum(measured.plain.by_position) > 0


def test_weights_are_those_of_the_file_with_or_without_the_embedding(target: ModelDirectory, heldout: HeldOut) -> None:
    for embedding in ("reference", "copy"):
        measured = measure(head_for(target, embedding), target, heldout, [])
        contract = tensor_contract(measured.config)
        assert {name: values.shape for name, values in measured.weights.items()} == {
            name: size for name, (dtype, size) in contract.items() if dtype == "BF16"
        }


def test_rounding_to_the_served_form_is_what_is_measured(
    target: ModelDirectory, heldout: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(weights: dict[str, Any]) -> dict[str, Any]:
        return {name: np.zeros_like(values) for name, values in weights.items()}

    before = measure(head_for(target), target, heldout, [])
    monkeypatch.setattr("pipeline.stages.eagle_measure.as_served", zeros)
    after = measure(head_for(target), target, heldout, [])
    assert after.plain == before.plain
    assert after.served != before.served
