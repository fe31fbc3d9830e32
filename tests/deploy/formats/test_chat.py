from datetime import date

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deploy.formats.chat import ChatTemplate, ChatTemplateError, after_answer, around_user_turn
from deploy.formats.errors import FormatError

MESSAGES = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "Grüße"},
    {"role": "assistant", "content": "Hello"},
]
SOURCES = {
    "chatml": (
        "{% for message in messages %}\n"
        "  {% if loop.first and message['role'] != 'system' %}<|system|>{% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "tokens": "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}",
    "tools": "{% if tools is not none or documents is not none %}more {% endif %}{{ messages[1].content }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("is_prompt", [True, False])
def test_it_renders_as_transformers_renders(name, is_prompt):
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=SOURCES[name], add_generation_prompt=is_prompt, bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate(SOURCES[name], bos_token="<s>", eos_token="</s>")
    assert ours.render(MESSAGES, add_generation_prompt=is_prompt) == theirs[0]


def test_a_templates_own_refusal_is_a_value_error():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(MESSAGES, add_generation_prompt=True)


def test_a_template_cannot_reach_into_python():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ChatTemplateError):
        template.render(MESSAGES, add_generation_prompt=True)


def test_a_template_cannot_change_the_messages():
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ messages.append(1) }}").render(MESSAGES, add_generation_prompt=True)


def test_a_source_that_does_not_compile_is_refused():
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_the_date_can_be_asked_for():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([], add_generation_prompt=False).startswith("2")


def test_a_fixed_day_is_the_date_whatever_the_present_one_is(tmp_path):
    source, day = "{{ strftime_now('%d %b %Y %H:%M') }}", date(1999, 12, 31)
    assert ChatTemplate(source, day=day).render([], add_generation_prompt=False) == "31 Dec 1999 00:00"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(source)
    found = ChatTemplate.from_directory(tmp_path, day=day)
    assert found.render([], add_generation_prompt=False) == "31 Dec 1999 00:00"


def test_special_tokens_that_the_tokenizer_names_can_be_written(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": {"content": "<unk>"}, "pad_token": null}')
    (tmp_path / "chat_template.jinja").write_text("{{ unk_token }}|{{ pad_token is defined }}|{{ eos_token }}")
    found = ChatTemplate.from_directory(tmp_path)
    assert found.render([], add_generation_prompt=False) == "<unk>|False|"


def test_the_identity_is_the_sources():
    assert ChatTemplate("a").identity == ChatTemplate("a", bos_token="x").identity != ChatTemplate("b").identity


def renderer(source):
    return lambda messages: ChatTemplate(source).render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["chatml", "generation"])
@pytest.mark.parametrize("earlier", [[], MESSAGES])
def test_the_parts_around_a_user_turn_join_to_the_prompt(name, earlier):
    render = renderer(SOURCES[name])
    before, after = around_user_turn(render, earlier)
    assert before + "Why?" + after == render([*earlier, {"role": "user", "content": "Why?"}])


def test_nothing_but_earlier_messages_comes_before_a_turn_without_a_header():
    assert around_user_turn(renderer(SOURCES["generation"])) == ("", "")
    assert around_user_turn(renderer(SOURCES["generation"]), MESSAGES)[0] == "".join(m["content"] for m in MESSAGES)


def test_a_directory_gives_template_and_special_tokens(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    with pytest.raises(FormatError, match=r"chat_template\.jinja: not readable"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(SOURCES["tokens"])
    found = ChatTemplate.from_directory(tmp_path)
    assert found.render([{"content": " a "}], add_generation_prompt=False) == "<s>a</s>"
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


def test_what_comes_behind_the_last_answer_is_what_ends_it():
    assert after_answer(ChatTemplate(SOURCES["chatml"])) == "<|im_end|>\n"
    assert after_answer(ChatTemplate(SOURCES["generation"])) == ""


def test_a_template_that_shows_no_answer_says_nothing_of_its_end():
    assert after_answer(ChatTemplate(SOURCES["tokens"], eos_token="</s>")) == ""
