from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.formats.chat import FIXED_DAY
from train.data.chat_format import ChatFormat

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
JOINED = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
USER = {"role": "user", "content": "Why?"}


def test_a_prompt_is_the_rendered_conversation_in_tokens(tools: Any) -> None:
    chat = tools.chat()
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_ids([USER]) == tuple(chat.tokenizer.encode(text, add_special_tokens=False).ids)
    assert tools.END in chat.prompt_ids([USER])


def test_the_user_prefix_continues_to_a_prompt(tools: Any) -> None:
    chat = tools.chat()
    earlier = [USER, {"role": "assistant", "content": "Because."}]
    for messages in ([], earlier):
        prefix, prompt = chat.user_prefix_ids(messages), chat.prompt_ids([*messages, USER])
        assert prompt[: len(prefix)] == prefix
        assert chat.text(prompt[len(prefix) :]).startswith("Why?")


def test_text_has_no_special_tokens(tools: Any) -> None:
    chat = tools.chat()
    assert chat.text([1, *chat.tokenizer.encode("Grüße").ids, 2]) == "Grüße"


def test_a_token_that_closes_user_turns_ends_a_self_written_one(tools: Any) -> None:
    assert tools.chat().end_ids == {2}
    assert tools.chat(MISTRAL, (0,)).end_ids == {0, 4}


def test_the_end_of_an_answer_is_the_templates(tools: Any) -> None:
    assert tools.chat(end_ids=(0, 2)).answer_end_id == 2
    assert tools.chat(JOINED, end_ids=(2, 0)).answer_end_id == 0


def test_a_template_that_only_joins_has_no_user_header(tools: Any) -> None:
    assert tools.chat().has_user_header
    assert tools.chat(MISTRAL).has_user_header
    assert not tools.chat(JOINED).has_user_header


def test_files_that_are_missing_or_broken_are_named(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: does not load"):
        ChatFormat.open(tmp_path, [2])
    tools.tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: no such file"):
        ChatFormat.open(tmp_path, [2])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|im_start|>"}}')
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not readable"):
        ChatFormat.open(tmp_path, [2])
    (tmp_path / "chat_template.jinja").write_text(tools.CHATML)
    opened = ChatFormat.open(tmp_path, [2])
    assert opened.prompt_ids([USER]) == tools.chat().prompt_ids([USER])
    assert opened.template.identity == tools.chat().template.identity


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("Today: {{ strftime_now('%d %b %Y') }}\n" + tools.CHATML)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2199, 1, 2)

    today = ChatFormat.open(tmp_path, [2]).prompt_ids([USER])
    monkeypatch.setattr("deploy.formats.chat.datetime", Tomorrow)
    chat = ChatFormat.open(tmp_path, [2])
    assert chat.prompt_ids([USER]) == today
    assert chat.text(today).startswith(f"Today: {FIXED_DAY:%d %b %Y}\n")


def test_a_prompt_is_whole_whatever_length_the_tokenizer_was_trained_with(tools: Any, tmp_path: Path) -> None:
    tokenizer = tools.tokenizer()
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(tools.CHATML)
    opened = ChatFormat.open(tmp_path, [2])
    assert opened.prompt_ids([USER]) == tools.chat().prompt_ids([USER])
    assert opened.token_ids("x") == tools.chat().token_ids("x")
