"""What a source says before it is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.target.inspect import has_user_header, tokenizer_rules
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


CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
JOINED = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(("template", "expected"), [(CHAT, True), (JOINED, False), (None, False)])
def test_a_file_says_whether_its_model_can_write_user_turns(
    tiny: Any, tmp_path: Path, template: str | None, expected: bool
) -> None:
    model = tiny.Gguf(fields={} if template is None else {"tokenizer.chat_template": template})
    assert has_user_header(Source("gguf", model.write(tmp_path / "model.gguf"), "x")) == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "one", "by name", None])
@pytest.mark.parametrize("template", [CHAT, JOINED])
def test_a_directory_says_it_wherever_its_template_lies(
    tiny: Any, tmp_path: Path, place: str | None, template: str
) -> None:
    tiny.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    stated = {
        "one": {"chat_template": template},
        "by name": {"chat_template": [{"name": "default", "template": template}]},
    }
    config["bos_token"] = {"__type": "AddedToken", "content": "<|im_start|>", "special": True}
    path.write_text(json.dumps(config | stated.get(place or "", {})))
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    expected = place is not None and template == CHAT
    assert has_user_header(Source("directory", tmp_path, "x")) == expected


def test_a_template_that_does_not_compile_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for")
    with pytest.raises(ValueError, match=r"^target\.path=here: the chat template does not compile"):
        has_user_header(Source("directory", tmp_path, "here"))
