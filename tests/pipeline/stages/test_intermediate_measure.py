"""What is measured of an intermediate is what a runtime with the trimmed head drafts, and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from deploy.runtime.backend import SEQUENCE_END, Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams
from pipeline.stages import intermediate_measure
from pipeline.stages.intermediate_measure import LikeliestTokens, _cut
from pipeline.stages.served_form import BYTES_PER_WEIGHT, read_bytes
from train.data.conversations import Conversation
from train.intermediate.rollout import HeldOutTexts

VOCAB = 263
IDS = np.array([0, 2, 5, 8, 13, 34, 55, 89, 144, 233], dtype=np.int64)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ModelDirectory:
    config: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": request.param,
        "eos_token_id": 2,
    }
    shape, rng = ModelShape.from_config(config), np.random.default_rng(0)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (0.3 * rng.standard_normal(size) + name.endswith("norm.weight")).astype(np.float32)
        for name, size in sizes.items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelDirectory.open(tmp_path)


def conversations() -> list[Conversation]:
    rng = np.random.default_rng(1)
    lengths = (40, 301, 17)
    texts = [rng.choice(IDS, length).astype(np.int32) for length in lengths]
    return [Conversation(ids, ((7, len(ids)),), 0.0, index) for index, ids in enumerate(texts)]


def test_drafts_are_those_of_a_runtime_with_only_those_rows(
    files: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intermediate_measure, "ROWS_PER_CALL", 29)
    texts = conversations()
    packed = np.concatenate([text.token_ids for text in texts])
    likeliest = LikeliestTokens(CpuBackend(files, threads=1), [np.arange(VOCAB), IDS])
    for kept in (IDS, np.arange(VOCAB)):
        found = likeliest.of(kept)(texts, list(range(len(packed))))
        trimmed = CpuBackend(files, threads=1, head_ids=kept)
        expected: list[int] = []
        for sequence, text in enumerate(texts):
            rows = [
                Row(token, position, sequence, SEQUENCE_END if position == 0 else position - 1)
                for position, token in enumerate(text.token_ids.tolist())
            ]
            expected += trimmed.forward_tokens(rows, SamplingParams()).tokens
        assert found == expected
        assert set(found) <= set(kept.tolist())


def test_texts_are_computed_once_for_all_sizes_and_groups_of_texts_apart(
    files: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CpuBackend(files, threads=1)
    computed = 0
    forward = backend.forward

    def counted(rows: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal computed
        computed += len(rows)
        return forward(rows, *arguments, **keywords)

    monkeypatch.setattr(backend, "forward", counted)
    likeliest = LikeliestTokens(backend, [np.arange(VOCAB), IDS])
    heldout = HeldOutTexts(conversations())
    replays = [heldout.replay(likeliest.of(kept), 3, kept) for kept in (np.arange(VOCAB), IDS)]
    assert computed == sum(len(text.token_ids) for text in conversations())
    assert replays[0].rounds > 0 and replays[1].outside_vocabulary == 0


def test_bytes_are_what_the_runtime_holds_without_an_embedding_of_which_it_reads_a_row(files: ModelDirectory) -> None:
    whole = CpuBackend(files, threads=1)
    cut = CpuBackend(files, threads=1, head_ids=IDS)
    padding = 64 * files.shape.hidden_size * 2
    assert read_bytes(whole, len(IDS)) == pytest.approx(cut.read_bytes, abs=padding)
    assert cut.weight_bytes - cut.read_bytes == pytest.approx(
        round(VOCAB * files.shape.hidden_size * BYTES_PER_WEIGHT) if files.shape.tied_embeddings else 0
    )
    assert read_bytes(whole, VOCAB) == whole.weight_bytes


def test_the_most_frequent_tokens_stay_and_those_that_end_a_text(files: ModelDirectory) -> None:
    counts = np.array([50, 0, 40, 30, 60, 1, 1, 1, 1, 1], dtype=np.int64)
    assert _cut(IDS, counts, 4, files).tolist() == [0, 2, 5, 13]
