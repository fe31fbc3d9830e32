"""What the eagle stage reads: whose head it trains, which conversations it measures on, what it counts tokens in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.manifest import FileEntry
from pipeline.stages.drafter_inputs import count_vocabulary, read_heldout, read_owner
from train.data.conversations import Conversation, Kept, to_line

TEMPLATE = "{{ messages[0]['content'] }}"


def conversation(index: int, temperature: float) -> Conversation:
    return Conversation(np.array([5, 6, 7, 7, index + 10], dtype=np.int32), ((2, 5),), temperature, index)


def write_shard(directory: Path, split: str, temperatures: list[float]) -> None:
    slots = [Kept(conversation(index, value), split, "p", 0, ()) for index, value in enumerate(temperatures)]
    (directory / "shard-00000.jsonl").write_text("".join(to_line(slot) + "\n" for slot in slots))


def test_only_greedy_conversations_are_measured_on_and_no_more_than_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path, "heldout", [0.0, 0.8, 0.0, 1.0, 0.0])
    assert [found.index for found in read_heldout(tmp_path, 2)] == [0, 2]
    assert [found.index for found in read_heldout(tmp_path, 9)] == [0, 2, 4]


def test_without_a_greedy_one_the_key_to_raise_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, "heldout", [0.8])
    with pytest.raises(ValueError, match=r"raise generate\.heldout_greedy_share or generate\.num_heldout"):
        read_heldout(tmp_path, 2)


def test_generated_counts_are_of_what_the_target_wrote(tmp_path: Path) -> None:
    counts = count_vocabulary("generated", [conversation(0, 0.0), conversation(1, 0.8)], tmp_path / "unused", 20)
    assert {token: int(count) for token, count in enumerate(counts) if count} == {7: 4, 10: 1, 11: 1}


def test_text_counts_are_of_pythons_own_texts(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "import": 1, "the": 2, "zyxw": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counts = count_vocabulary("text", [], tmp_path / "tokenizer.json", 4)
    assert min(counts[:3]) > 1000
    assert counts[3] == 0


def test_text_counts_are_of_whole_texts_as_long_as_they_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "import": 1, "the": 2, "zyxw": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=3, pad_token="zyxw")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counts = count_vocabulary("text", [], tmp_path / "tokenizer.json", 4)
    assert min(counts[:3]) > 1000
    assert counts[3] == 0


@pytest.fixture
def context(tmp_path: Path) -> Any:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    identity = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    (tmp_path / "data.json").write_text(json.dumps({"chat_template": identity}))
    target = SimpleNamespace(files={"model/tokenizer.json": FileEntry(1, "a" * 64)})
    files = {"model/config.json": FileEntry(1, "b" * 64), "stats.json": FileEntry(1, "d" * 64)}
    quantized = SimpleNamespace(content="c" * 64, files=files)
    return SimpleNamespace(
        inputs={"target": tmp_path, "generate": tmp_path}, manifests={"target": target, "quantize": quantized}
    )


def test_the_owner_is_the_quantized_target_with_the_targets_tokenizer(context: Any) -> None:
    owner = read_owner(context)
    assert (owner.content, owner.tokenizer) == ("c" * 64, "a" * 64)
    assert owner.model_files == {"config.json": "b" * 64}
    assert owner.chat_template == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_conversations_under_another_chat_template_are_refused(context: Any) -> None:
    (context.inputs["generate"] / "data.json").write_text(json.dumps({"chat_template": "e" * 64}))
    with pytest.raises(ValueError, match=r"under the chat template eeee.*generate them again \(force=generate\)"):
        read_owner(context)
