"""A whole data set: the same bytes in whatever order answers come and however often the run is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.data.conversations import Kept, Lost, read_conversations
from train.data.engines.base import Request
from train.data.generation import DataGenerator
from train.data.prompts import Openings, PromptRecord
from train.data.recipe import Recipe
from train.data.shards import ShardDirectory

RECORDS = [PromptRecord((f"question {index}", "and then?")) for index in range(12)]
Generate = Callable[..., Any]


@pytest.fixture
def generate(tools: Any) -> Generate:
    """Runs into a directory; returns the engine."""

    def run(
        out: Path,
        recipe: Recipe,
        openings: Openings | None = None,
        answer: Callable[[Request], str] = tools.babble,
        on_tokens: Callable[[int], None] = lambda count: None,
        **engine: Any,
    ) -> Any:
        out.mkdir(exist_ok=True)
        chat = tools.chat()
        rule = tools.RuleEngine(answer, chat.tokenizer, **engine)
        shards = ShardDirectory(out)
        DataGenerator(chat, recipe, openings or Openings([], 0.0, 0), rule, shards, on_tokens).run()
        return rule

    return run


def slots(out: Path) -> list[Kept | Lost]:
    shards = ShardDirectory(out)
    return [slot for number in range(len(list(out.iterdir()))) for slot in shards.read(number) or []]


def test_the_budget_is_reached_by_the_last_shard_and_by_no_earlier_one(
    generate: Generate, tools: Any, tmp_path: Path
) -> None:
    generate(tmp_path, tools.recipe(num_tokens=900))
    written = [slot.num_written for slot in slots(tmp_path)]
    assert sum(written) >= 900 > sum(written[:-4])
    indices = [slot.conversation.index if isinstance(slot, Kept) else slot.index for slot in slots(tmp_path)]
    assert indices == list(range(len(written)))


@pytest.mark.parametrize("num_turns", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_order_of_answers_and_the_engines_width_change_no_byte(
    generate: Generate, tools: Any, tmp_path: Path, share: float, num_turns: int
) -> None:
    found = []
    for order, capacity in ((0, 1), (1, 9), (2, 50)):
        out = tmp_path / f"{order}"
        openings = Openings(RECORDS, share, seed=1)
        generate(out, tools.recipe(num_turns=num_turns), openings, order=order, capacity=capacity)
        found.append(tools.contents(out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 3


@pytest.mark.parametrize("is_batch_invariant", [True, False])
def test_a_run_interrupted_again_and_again_ends_in_the_same_bytes(
    generate: Generate, tools: Any, tmp_path: Path, is_batch_invariant: bool
) -> None:
    recipe = tools.recipe(num_turns=2)
    generate(tmp_path / "whole", recipe)
    whole, num_interrupted = tools.contents(tmp_path / "whole"), 0
    while True:
        before = set(tools.contents(tmp_path / "parts")) if num_interrupted else set()
        try:
            engine = {"fails_after": 23, "order": num_interrupted, "is_batch_invariant": is_batch_invariant}
            generate(tmp_path / "parts", recipe, **engine)
            break
        except InterruptedError:
            num_interrupted += 1
            assert before <= set(tools.contents(tmp_path / "parts"))
    assert num_interrupted > 1
    assert tools.contents(tmp_path / "parts") == whole


def test_every_single_shard_can_be_the_missing_one(generate: Generate, tools: Any, tmp_path: Path) -> None:
    recipe = tools.recipe(num_tokens=400)
    generate(tmp_path, recipe)
    whole = tools.contents(tmp_path)
    for name in whole:
        (tmp_path / name).unlink()
        engine = generate(tmp_path, recipe)
        assert tools.contents(tmp_path) == whole
        assert {request.number // recipe.shard_size for request in engine.asked} >= {int(name[6:12])}


def test_a_finished_data_set_asks_for_nothing(generate: Generate, tools: Any, tmp_path: Path) -> None:
    generate(tmp_path, tools.recipe())
    assert generate(tmp_path, tools.recipe()).asked == []


def test_the_same_prompt_comes_once_over_all_shards_and_splits(generate: Generate, tools: Any, tmp_path: Path) -> None:
    def few_prompts(request: Request) -> str:
        is_prompt = request.sample_index < 1 << 32
        return f"prompt {request.sample_index % 11}" if is_prompt else tools.babble(request)

    generate(tmp_path, tools.recipe(num_tokens=700), answer=few_prompts)
    found = slots(tmp_path)
    prompts = [slot.prompt for slot in found if isinstance(slot, Kept)]
    assert sorted(prompts) == sorted({f"prompt {index}" for index in range(11)})
    assert {slot.reason for slot in found if isinstance(slot, Lost)} == {"duplicate"}
    assert len(read_conversations(tmp_path, "heldout")) == 5


def test_a_prompt_of_a_file_is_not_repeated_by_a_self_written_one(
    generate: Generate, tools: Any, tmp_path: Path
) -> None:
    def copycat(request: Request) -> str:
        return "question 3" if request.sample_index < 1 << 32 else tools.babble(request)

    generate(tmp_path, tools.recipe(num_tokens=500), Openings(RECORDS, 0.5, 0), answer=copycat)
    prompts = [slot.prompt for slot in slots(tmp_path) if isinstance(slot, Kept)]
    assert prompts.count("question 3") == 1
    assert len(prompts) > 5


def test_no_two_requests_share_their_noise(generate: Generate, tools: Any, tmp_path: Path) -> None:
    engine = generate(tmp_path, tools.recipe(num_turns=3))
    keys = {(request.sample_index, len(request.prompt)) for request in engine.asked}
    assert len(keys) == len(engine.asked)


def test_given_prompts_end_the_data_set_before_its_budget(generate: Generate, tools: Any, tmp_path: Path) -> None:
    generate(tmp_path, tools.recipe(num_tokens=100_000), Openings(RECORDS, 1.0, 0))
    assert sorted(slot.prompt for slot in slots(tmp_path) if isinstance(slot, Kept)) == sorted(
        record.turns[0] for record in RECORDS
    )


def test_without_batch_invariance_only_one_shards_requests_are_in_flight(
    generate: Generate, tools: Any, tmp_path: Path
) -> None:
    engine = generate(tmp_path, tools.recipe(), is_batch_invariant=False, capacity=100)
    assert engine.most_waiting == 4
    numbers = [request.number // 4 for request in engine.asked]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(("is_batch_invariant", "shards"), [(True, {0, 1, 2}), (False, {0})])
def test_a_killed_run_loses_as_many_shards_as_keep_the_engine_busy(
    tools: Any, tmp_path: Path, is_batch_invariant: bool, shards: set[int]
) -> None:
    """generate.shard_size: at first capacity / shard_size + 1 of them, here 9 / 4 + 1."""
    chat, named = tools.chat(), {"capacity": 9, "is_batch_invariant": is_batch_invariant, "fails_after": 0}
    engine = tools.RuleEngine(tools.babble, chat.tokenizer, **named)
    out = ShardDirectory(tmp_path)
    with pytest.raises(InterruptedError):
        DataGenerator(chat, tools.recipe(num_tokens=4000), Openings([], 0.0, 0), engine, out, lambda count: None).run()
    assert {request.number // 4 for request in engine.asked} == shards


def test_enough_is_waiting_to_fill_the_engine_and_little_is_begun_in_vain(
    generate: Generate, tools: Any, tmp_path: Path
) -> None:
    engine = generate(tmp_path, tools.recipe(num_tokens=4000), capacity=10)
    assert engine.most_waiting > 10
    begun = max(request.number for request in engine.asked) // 4 + 1
    assert begun <= 1.4 * len(list(tmp_path.iterdir()))


def test_every_tokens_is_told_as_it_comes(generate: Generate, tools: Any, tmp_path: Path) -> None:
    told: list[int] = []
    generate(tmp_path, tools.recipe(), on_tokens=told.append)
    assert sum(told) >= ShardDirectory(tmp_path).num_tokens()


def test_a_target_whose_prompts_never_end_is_told_what_to_do(generate: Generate, tools: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only 0 of 256 prompts became conversations \(prompt did not end: 256\)"):
        generate(tmp_path, tools.recipe(num_tokens=10**9), answer=lambda request: "x" * 99)
