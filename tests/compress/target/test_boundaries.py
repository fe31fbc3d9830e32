"""Which tokens end an answer, wherever a model directory says so, and whether its texts begin with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from compress.target.boundaries import begins_with_bos, complete_end_tokens
from compress.target.gguf_convert import write_tokenizer
from compress.target.gguf_source import GgufFile
from deploy.formats.model_dir import ModelDirectory

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}"
BLANKS_FIRST = "{% for m in messages %}{{ m.content + ' \n<|im_end|>' }}{% endfor %}"
TEXT_FIRST = "{% for m in messages %}{{ m.content + ' end <|im_end|>' }}{% endfor %}"
NO_ANSWERS = "{{ '<|im_end|>' + messages[0].content + '<|im_end|>' }}"
REFUSING = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def ends(tiny: Any) -> tuple[int, int, int]:
    """<|endoftext|>, <|im_start|>, <|im_end|>."""
    return tuple(tiny.vocabulary().index(token) for token in tiny.special)  # type: ignore[return-value]


@pytest.fixture
def directory(tiny: Any, tmp_path: Path, ends: tuple[int, int, int]) -> Path:
    """Joins messages, and declares <|endoftext|> in every place that it has."""
    path: Path = tiny.directory(tmp_path / "model", eos_token_id=ends[0], bos_token_id=None)
    (path / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": ends[0]}))
    (path / "chat_template.jinja").write_text(JOINED)
    edit(path / "tokenizer_config.json", eos_token="<|endoftext|>", bos_token="<|im_start|>")
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def listed(directory: Path) -> tuple[int, ...]:
    with ModelDirectory.open(directory) as files:
        return files.eos_token_ids


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_token_behind_the_templates_answers_ends_one(directory: Path, ends: tuple[int, int, int]) -> None:
    (directory / "chat_template.jinja").write_text(CHATML)
    assert complete_end_tokens(directory) == [ends[2]]
    assert listed(directory) == (ends[0], ends[2])
    assert json.loads((directory / "generation_config.json").read_text())["top_p"] == 0.9


def test_the_tokenizers_end_token_ends_one(directory: Path, ends: tuple[int, int, int]) -> None:
    edit(directory / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    assert complete_end_tokens(directory) == [ends[2]]


def test_the_configurations_ends_an_answer_too_if_it_is_a_special_token(
    directory: Path, ends: tuple[int, int, int]
) -> None:
    edit(directory / "config.json", eos_token_id=[2, ends[2]])
    assert complete_end_tokens(directory) == [ends[2]]


def test_without_a_generation_configuration_one_is_made_where_there_is_something_to_add(
    directory: Path, ends: tuple[int, int, int]
) -> None:
    (directory / "generation_config.json").unlink()
    assert complete_end_tokens(directory) == []
    assert not (directory / "generation_config.json").exists()
    (directory / "chat_template.jinja").write_text(CHATML)
    complete_end_tokens(directory)
    assert listed(directory) == (ends[0], ends[2])


@pytest.mark.parametrize(
    ("template", "is_added"),
    [(BLANKS_FIRST, True), (TEXT_FIRST, False), (NO_ANSWERS, False), (REFUSING, False), (JOINED, False)],
    ids=["blanks first", "text first", "no answers", "refusing", "joined"],
)
def test_only_a_special_token_right_behind_an_answer_counts(
    directory: Path, ends: tuple[int, int, int], template: str, is_added: bool
) -> None:
    (directory / "chat_template.jinja").write_text(template)
    assert complete_end_tokens(directory) == ([ends[2]] if is_added else [])


def test_where_nothing_is_added_no_byte_changes(directory: Path) -> None:
    before = contents(directory)
    assert complete_end_tokens(directory) == []
    assert contents(directory) == before
    (directory / "chat_template.jinja").write_text(CHATML)
    complete_end_tokens(directory)
    completed = contents(directory)
    assert complete_end_tokens(directory) == []
    assert contents(directory) == completed


def test_an_end_token_that_the_model_cannot_write_is_left_out(directory: Path, tiny: Any) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|beyond|>", "<|further|>"])
    assert tokenizer.token_to_id("<|further|>") >= 271
    tokenizer.save(str(directory / "tokenizer.json"))
    edit(directory / "tokenizer_config.json", eos_token="<|further|>")
    assert complete_end_tokens(directory) == []


def test_the_embedded_models_files_stay_as_they_are(tiny: Any, tmp_path: Path) -> None:
    """Its drafters are bound to their digests."""
    sizes = {"vocab_size": 49152, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    path: Path = tiny.directory(tmp_path / "model", eos_token_id=2, **sizes)
    write_tokenizer(GgufFile(tiny.embedded_file()), path)
    before = contents(path)
    assert complete_end_tokens(path) == []
    assert contents(path) == before


def test_a_post_processor_that_puts_the_token_in_front_begins_every_text(
    directory: Path, ends: tuple[int, int, int]
) -> None:
    assert not begins_with_bos(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for token, expected in (("<|endoftext|>", False), ("<|im_start|>", True)):
        pair = (token, tokenizer.token_to_id(token))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[pair])
        tokenizer.save(str(directory / "tokenizer.json"))
        assert begins_with_bos(directory) is expected


def test_a_gguf_file_says_it_in_its_metadata(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", add_bos_token=True)
    assert begins_with_bos(directory)
    edit(directory / "tokenizer_config.json", bos_token=None)
    assert not begins_with_bos(directory)
