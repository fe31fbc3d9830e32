"""What a source says before it is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.target.inspect import tokenizer_rules
from compress.target.sources import Source


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", {}),
        ("gpt-2", {}),
        ("qwen2", {"rules of qwen2 tokenizers": "1"}),
        ("llama-bpe", {"rules of llama-bpe tokenizers": "1"}),
        ("chaos", {}),
    ],
)
def test_only_rules_that_were_changed_are_named_beside_the_file(
    tiny: Any, tmp_path: Path, pre: str, expected: dict[str, str]
) -> None:
    model = tiny.Gguf(fields={"tokenizer.ggml.pre": pre})
    assert tokenizer_rules(Source("gguf", model.write(tmp_path / "model.gguf"), "x")) == expected


def test_a_directory_has_no_such_rules(tmp_path: Path) -> None:
    assert tokenizer_rules(Source("directory", tmp_path, "x")) == {}
