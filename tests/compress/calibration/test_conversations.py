"""The frame around a user turn, from the chat templates of the models that are supported; and what is written in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import pytest

from compress.calibration.conversations import ChatFrame, ConversationBudget, num_begun, write_conversations
from compress.calibration.generate import SamplingRule
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.stages.text_writer import RuntimeWriter

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = CHATML.replace("loop.first and m['role'] != 'system'", "false")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023<|eot_id|>' }}{% endif %}",
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
JOINED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def renderer(source: str) -> Callable[[list[dict[str, str]]], str]:
    """As a tokenizer of transformers renders."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "raise_exception": refuse}
    return lambda messages: template.render(messages=messages, **given)


@pytest.mark.parametrize(
    ("source", "ends", "expected"),
    [
        (
            CHATML,
            ["<|im_end|>"],
            (
                "<|im_start|>system\nYou are a helpful AI.<|im_end|>\n",
                "<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n",
            ),
        ),
        (PLAIN_CHATML, ["<|im_end|>"], ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")),
        (
            LLAMA3,
            ["<|end_of_text|>", "<|eot_id|>"],
            (
                "<s>",
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
        ),
        (
            LLAMA31,
            ["<|eot_id|>"],
            (
                "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023<|eot_id|>",
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
        ),
        (MISTRAL, ["</s>"], ("", "<s>[INST] ", " [/INST]")),
        (MISTRAL_WITHOUT_SYSTEM, ["</s>"], ("", "<s>[INST] ", " [/INST]")),
        (JOINED, ["</s>"], ("", "", "")),
    ],
    ids=[
        "chatml",
        "chatml without default",
        "llama 3",
        "llama 3.1",
        "mistral",
        "mistral without system",
        "no template",
    ],
)
def test_the_frame_is_what_the_template_writes_around_a_user_turn(
    source: str, ends: list[str], expected: tuple[str, str, str]
) -> None:
    frame = ChatFrame.from_template(renderer(source), ends)
    assert (frame.system, frame.before, frame.after) == expected


def test_a_token_that_begins_every_text_is_no_part_of_the_system_prompt() -> None:
    frame = ChatFrame.from_template(renderer(LLAMA31), ["<|eot_id|>"], "<s>")
    assert frame.first == "<s>"
    assert not frame.system.startswith(frame.first)
    assert ChatFrame.from_template(renderer(CHATML), ["<|im_end|>"], "<|im_start|>").first == ""


def test_a_token_that_begins_every_text_is_no_user_header() -> None:
    frame = ChatFrame.from_template(renderer("{{ bos_token }}" + JOINED), ["</s>"], "<s>")
    assert (frame.system, frame.before, frame.after) == ("", "", "")


@pytest.mark.parametrize("source", [CHATML, PLAIN_CHATML, LLAMA3, LLAMA31, MISTRAL, MISTRAL_WITHOUT_SYSTEM])
def test_the_frame_around_a_turn_is_the_templates_prompt(source: str) -> None:
    render = renderer(source)
    frame = ChatFrame.from_template(render, ["<|im_end|>", "<|eot_id|>"])
    for turn in ("Why is the sky blue?", "[INST] x"):
        assert frame.system + frame.before + turn + frame.after == render([{"role": "user", "content": turn}])


ENDS = frozenset({2, *range(250, 271)})
RULE = SamplingRule(temperature=1.0, top_p=1.0, end_ids=ENDS)
BUDGET: dict[str, Any] = {
    "num_samples": 8,
    "prompt_tokens": 40,
    "response_tokens": 9,
    "system_share": 0.25,
    "drop_share": 0.2,
}
FRAME = ChatFrame(system="SS", before="U", after="A")


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def backend(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> CpuBackend:
    """Says anything, and ends a turn after about a dozen tokens (22 of 271 end it)."""
    path = tmp_path_factory.mktemp("conversations")
    model = tiny.causal_lm(tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(0.02)
    model.save_pretrained(path)
    return CpuBackend(path, threads=1)


def write(
    backend: CpuBackend, *, seed: int = 0, frame: ChatFrame = FRAME, steps: Any = None, **changes: Any
) -> list[list[int]]:
    writer = RuntimeWriter(backend, (lambda count: None) if steps is None else steps.append)
    return write_conversations(writer, encode, frame, RULE, ConversationBudget(**(BUDGET | changes)), seed=seed)


def test_each_conversation_is_one_turn_and_one_answer_in_the_frame(backend: CpuBackend) -> None:
    found = write(backend)
    assert len(found) == 8
    header, bridge = ord("U"), ord("A")
    for ids in found:
        body = ids[2:] if ids[:2] == encode("SS") else ids
        assert body[0] == header
        turn = body[1 : body.index(bridge, 2)]
        assert 0 < len(turn) < 40
        assert not ENDS & set(turn)


def test_a_share_of_the_samples_keeps_the_system_prompt(backend: CpuBackend) -> None:
    for share, kept in ((0.0, 0), (0.25, 2), (0.5, 4)):
        assert sum(ids[:2] == encode("SS") for ids in write(backend, system_share=share)) == kept


def test_the_seed_decides_the_conversations(backend: CpuBackend) -> None:
    assert write(backend, seed=1) == write(backend, seed=1)
    assert write(backend, seed=1) != write(backend, seed=2)


def test_progress_is_at_most_the_budget(backend: CpuBackend) -> None:
    done: list[int] = []
    write(backend, steps=done)
    budget = ConversationBudget(**BUDGET)
    assert num_begun(budget.num_wanted) * 40 < sum(done) <= budget.most_tokens


def test_turns_are_begun_until_enough_have_ended(backend: CpuBackend) -> None:
    """Within 9 tokens half of them end; what a first round gave stays."""
    done: list[int] = []
    found = write(backend, steps=done, prompt_tokens=9, response_tokens=1)
    assert len(found) == 8
    assert sum(done) > ConversationBudget(**(BUDGET | {"prompt_tokens": 9, "response_tokens": 1})).most_tokens
    wide, narrow = (write(backend, prompt_tokens=40, num_samples=n, drop_share=0.0, system_share=0.0) for n in (8, 4))
    assert wide[:4] == narrow


def test_turns_that_do_not_end_are_an_error_naming_the_budget(backend: CpuBackend) -> None:
    with pytest.raises(ValueError, match=r"self-written user turns ended within calibrate\.chat\.prompt_tokens=1;"):
        write(backend, prompt_tokens=1)


def test_more_than_the_context_holds_is_refused_before_anything_is_written(backend: CpuBackend) -> None:
    done: list[int] = []
    with pytest.raises(
        ValueError, match=r"^calibrate\.chat\.response_tokens=117 .*=40 and the .* 4 exceeds .* of 160;"
    ):
        write(backend, steps=done, response_tokens=117)
    assert not done


def test_a_template_without_a_user_header_is_an_error_with_its_remedy(backend: CpuBackend) -> None:
    with pytest.raises(
        ValueError, match=r"no user header.*calibrate\.chat\.num_samples=0 calibrate\.chat\.num_heldout=0"
    ):
        write(backend, frame=ChatFrame.from_template(renderer(JOINED), []))
