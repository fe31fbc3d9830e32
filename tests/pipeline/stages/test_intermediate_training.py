"""The texts of pre-training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.stages.intermediate_training import _texts

WORDS = 40


def test_texts_are_learnt_whole_whatever_length_the_tokenizer_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.enable_truncation(20)
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "texts.txt").write_text(" ".join(f"w{index % WORDS}" for index in range(300)))
    context: Any = SimpleNamespace(
        inputs={"target": tmp_path}, config={"pretrain": {"text": {"heldout_share": 0.0}}}, seed=3
    )
    found = _texts(context, {"source": "file", "path": str(tmp_path / "texts.txt")}, max_length=100)
    assert [part.token_ids.tolist() for part in found] == [
        [index % WORDS for index in range(begin, begin + 100)] for begin in (0, 100, 200)
    ]
