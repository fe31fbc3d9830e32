"""A slot turn by turn, driven by hand."""

from __future__ import annotations

from typing import Any

import pytest

from train.data.conversations import Kept, Lost
from train.data.dialogue import RESPONSES, Opening, converse, open_slot
from train.data.prompts import PromptRecord
from train.data.recipe import SelfWritten

GIVEN = Opening("Why?", ("And?", "So?"), num_written=0, is_given=True)
OWN = Opening("Why?", (), num_written=7, is_given=False)
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # leaves earlier answers out
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def text(chat: Any, ids: Any) -> str:
    return str(chat.tokenizer.decode(list(ids), skip_special_tokens=False))


def test_a_record_opens_without_a_request(tools: Any) -> None:
    steps = open_slot(tools.chat(), tools.recipe(), 4, PromptRecord(("Why?", "And?")))
    requests, opening = tools.answered(steps, [])
    assert requests == []
    assert opening == Opening("Why?", ("And?",), num_written=0, is_given=True)


def test_the_target_writes_a_prompt_from_its_user_prefix(tools: Any) -> None:
    chat, recipe = tools.chat(), tools.recipe()
    (request,), opening = tools.answered(open_slot(chat, recipe, 4, None), [" Why so? \n"])
    assert text(chat, request.prompt) == "<|im_start|>user\n"
    rule = recipe.self_written
    assert (request.temperature, request.top_p, request.max_tokens) == (rule.temperature, rule.top_p, rule.max_tokens)
    assert (request.number, request.sample_index) == (4, 4)
    assert opening == Opening("Why so?", (), num_written=len(" Why so? \n") + 1, is_given=False)


def test_a_self_written_prompt_begins_with_the_words_drawn_for_its_slot(tools: Any) -> None:
    recipe = tools.recipe(self_written=SelfWritten(24, 0.8, 0.9, ("", "What is", "Explain")))
    seen = set()
    for index in range(40):
        words = recipe.first_words(index)
        (request,), opening = tools.answered(open_slot(tools.chat(), recipe, index, None), [" so? \n"])
        assert text(tools.chat(), request.prompt) == f"<|im_start|>user\n{words}"
        assert opening == Opening(f"{words} so?".strip(), (), num_written=len(" so? \n") + 1, is_given=False)
        seen.add(words)
    assert seen == {"", "What is", "Explain"}
    _, lost = tools.answered(open_slot(tools.chat(), recipe, 0, None), [" \n"])
    assert lost == Lost(0, "prompt is empty", 3)


@pytest.mark.parametrize(("answer", "reason"), [((9, 9, 9), "prompt did not end"), (" \n", "prompt is empty")])
def test_a_prompt_that_is_none_loses_the_slot(tools: Any, answer: Any, reason: str) -> None:
    _, lost = tools.answered(open_slot(tools.chat(), tools.recipe(), 4, None), [answer])
    assert lost == Lost(4, reason, 3)


def test_one_turn_has_its_answer_as_span_with_the_end_token(tools: Any) -> None:
    chat, recipe = tools.chat(), tools.recipe()
    (request,), kept = tools.answered(converse(chat, recipe, 9, 6, OWN), ["Because."])
    assert request.prompt == chat.prompt_ids([{"role": "user", "content": "Why?"}])
    assert request.sample_index == RESPONSES + 9
    assert request.temperature == recipe.temperature(6, 9)
    ((begin, end),) = kept.conversation.spans
    assert text(chat, kept.conversation.token_ids[begin:end]) == "Because.<|im_end|>"
    assert begin == len(request.prompt)
    assert end == len(kept.conversation.token_ids)
    assert (kept.split, kept.prompt, kept.num_prompt_tokens, kept.notes) == ("train", "Why?", 7, ())
    assert kept.conversation.temperature == request.temperature


def test_given_turns_follow_one_another_as_the_template_renders_them(tools: Any) -> None:
    chat = tools.chat()
    recipe = tools.recipe(num_turns=5)
    requests, kept = tools.answered(converse(chat, recipe, 9, 6, GIVEN), ["one", "two", "three"])
    answers = ["one", "two", "three"]
    messages = [{"role": "user", "content": "Why?"}]
    for request, answer, following in zip(requests, answers, ["And?", "So?", ""], strict=True):
        assert request.prompt == chat.prompt_ids(messages)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": following}]
    assert [request.continues_turns for request in requests] == [False, True, True]
    spans = [text(chat, kept.conversation.token_ids[begin:end]) for begin, end in kept.conversation.spans]
    assert spans == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    assert kept.notes == ()


def test_no_more_turns_than_asked_for(tools: Any) -> None:
    _, kept = tools.answered(converse(tools.chat(), tools.recipe(num_turns=2), 9, 6, GIVEN), ["one", "two"])
    assert len(kept.conversation.spans) == 2


def test_the_target_writes_further_turns_after_its_own(tools: Any) -> None:
    chat, recipe = tools.chat(), tools.recipe(num_turns=2)
    requests, kept = tools.answered(converse(chat, recipe, 9, 6, OWN), ["one", "Go on", "two"])
    assert text(chat, requests[1].prompt).endswith("<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n")
    assert requests[1].temperature == recipe.self_written.temperature
    assert requests[2].prompt[: len(requests[1].prompt)] == requests[1].prompt
    assert len(kept.conversation.spans) == 2
    assert kept.num_prompt_tokens == 7 + len("Go on") + 1


def test_a_further_prompt_that_does_not_end_leaves_the_turns_before(tools: Any) -> None:
    recipe = tools.recipe(num_turns=3)
    _, kept = tools.answered(converse(tools.chat(), recipe, 9, 6, OWN), ["one", (9, 9)])
    assert len(kept.conversation.spans) == 1
    assert kept.notes == ("no further prompt",)
    assert kept.num_prompt_tokens == 9


def test_a_response_cut_at_the_limit_is_not_continued_and_has_no_end_token(tools: Any) -> None:
    _, kept = tools.answered(converse(tools.chat(), tools.recipe(num_turns=3), 9, 6, GIVEN), [(9, 10, 11)])
    assert kept.conversation.token_ids[-3:].tolist() == [9, 10, 11]
    assert kept.notes == ("response cut",)


def test_a_response_that_goes_round_in_circles_ends_there_and_ends_the_conversation(tools: Any) -> None:
    answer = (5, 6, *[7, 8, 9] * 80)
    recipe = tools.recipe(num_turns=3, max_tokens=242)
    (request,), kept = tools.answered(converse(tools.chat(), recipe, 9, 6, GIVEN), [answer])
    assert request.stops_loops
    ((begin, end),) = kept.conversation.spans
    assert kept.conversation.token_ids[begin:end].tolist() == list(answer[:64])
    assert kept.notes == ("response loops",)
    recipe = tools.recipe(num_turns=3, max_tokens=242, stop_loops=False)
    (request,), kept = tools.answered(converse(tools.chat(), recipe, 9, 6, GIVEN), [answer])
    assert not request.stops_loops
    assert kept.conversation.num_written == 242
    assert kept.notes == ("response cut",)


@pytest.mark.parametrize(("template", "answer"), [(TRIMMING, "one "), (FORGETFUL, "one")])
@pytest.mark.parametrize("opening", [GIVEN, OWN], ids=["given", "own"])
def test_turns_that_the_template_writes_otherwise_again_end_the_conversation(
    tools: Any, template: str, answer: str, opening: Opening
) -> None:
    steps = converse(tools.chat(template), tools.recipe(num_turns=3), 9, 6, opening)
    _, kept = tools.answered(steps, [answer])
    assert len(kept.conversation.spans) == 1
    assert kept.notes == ("turns re-rendered",)


def test_the_same_template_goes_on_where_it_writes_them_alike(tools: Any) -> None:
    _, kept = tools.answered(converse(tools.chat(TRIMMING), tools.recipe(num_turns=2), 9, 6, GIVEN), ["one", "two"])
    assert len(kept.conversation.spans) == 2


def test_what_does_not_fit_the_context_is_not_begun_or_not_continued(tools: Any) -> None:
    chat = tools.chat()
    needed = len(chat.prompt_ids([{"role": "user", "content": "Why?"}])) + 24
    steps = converse(chat, tools.recipe(context_length=needed - 1), 9, 6, OWN)
    assert tools.answered(steps, []) == ([], Lost(9, "prompt is too long", 7))
    steps = converse(chat, tools.recipe(context_length=needed, num_turns=2), 9, 6, GIVEN)
    _, kept = tools.answered(steps, ["one"])
    assert isinstance(kept, Kept)
    assert kept.notes == ("context full",)


def test_a_further_prompt_is_asked_for_only_where_it_and_an_answer_fit(tools: Any) -> None:
    chat = tools.chat()
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "one"}]
    prefix = len(chat.user_prefix_ids(messages))
    for self_written in (20, 60):  # fewer tokens than an answer's 24, and more
        budget, rule = max(self_written, 24), SelfWritten(self_written, 0.8, 0.9)
        recipe = tools.recipe(num_turns=2, self_written=rule, context_length=prefix + budget)
        requests, kept = tools.answered(converse(chat, recipe, 9, 6, OWN), ["one", (9, 9)])
        assert [len(request.prompt) for request in requests[1:]] == [prefix]
        assert kept.notes == ("no further prompt",)
        recipe = tools.recipe(num_turns=2, self_written=rule, context_length=prefix + budget - 1)
        _, kept = tools.answered(converse(chat, recipe, 9, 6, OWN), ["one"])
        assert kept.notes == ("context full",)
        assert kept.num_prompt_tokens == 7
