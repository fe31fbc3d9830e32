"""The evaluate stage on a tiny random model: which prompts it takes, what it writes, and that it fails loudly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.safetensors_file import write_safetensors
from pipeline.graph import BuildContext
from pipeline.stages.evaluate import build, check
from train.data.conversations import Conversation, Kept, to_line

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 96,
    "tie_word_embeddings": True,
    "eos_token_id": 96,
}
CONFIG = {"method": "measure", "num_prompts": 2, "num_texts": 3, "max_tokens": 12, "repeats": 2, "temperature": 0.9}


@contextmanager
def progress(_total: int, _what: str, _unit: str) -> Iterator[Any]:
    yield SimpleNamespace(update=lambda _count: None)


def write_model(directory: Path) -> None:
    directory.mkdir(parents=True)
    rng, shape = np.random.default_rng(0), ModelShape.from_config(MODEL)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (0.1 * rng.standard_normal(size) + name.endswith("norm.weight")).astype(np.float32)
        for name, size in sizes.items()
    }
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(MODEL))


def write_tokenizer(directory: Path) -> None:
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def sample(group: str, split: str, length: int) -> str:
    ids = [(7 * place + length) % 96 for place in range(length)]
    return json.dumps({"group": group, "split": split, "source": f"{group}/{length}", "ids": ids, "text": ""})


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    found = {role: tmp_path / role for role in ("target", "quantize", "calibrate", "generate")}
    write_tokenizer(found["target"] / "model")
    write_model(found["quantize"] / "model")
    (found["quantize"] / "stats.json").write_text('{"float_minima": false}')
    found["calibrate"].mkdir()
    lines = [sample("prose", "calibration", 40), sample("prose", "heldout", 41), sample("prose", "heldout", 42)]
    lines += [sample("code", "heldout", 43), sample("code", "heldout", 44)]
    (found["calibrate"] / "samples.jsonl").write_text("\n".join(lines) + "\n")
    found["generate"].mkdir()
    slots = []
    for index, length in enumerate((20, 21, 22)):
        ids = np.arange(length, dtype=np.int32)
        slots.append(Kept(Conversation(ids, ((9, length),), 0.0, index), "heldout", "", 0, ()))
    (found["generate"] / "shard-00000.jsonl").write_text("\n".join(map(to_line, slots)) + "\n")
    return found


def context(out: Path, inputs: dict[str, Path], **changes: Any) -> BuildContext:
    scratch = out.with_name(f"{out.name}-scratch")
    for directory in (out, scratch):
        directory.mkdir()
    tracker: Any = SimpleNamespace(summary=lambda *_: None, log=lambda *_: None)
    return BuildContext("evaluate", out, scratch, inputs, {}, {**CONFIG, **changes}, 3, tracker, progress)


def test_it_writes_the_measurement_and_the_plan_and_says_that_they_are_this_machines(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    made = context(tmp_path / "out", inputs)
    build(1, made)
    assert {path.name for path in made.out.iterdir()} == {"evaluate.json", "plan.json"}
    result = json.loads((made.out / "evaluate.json").read_text())
    plan = json.loads((made.out / "plan.json").read_text())
    assert list(result["modes"]) == list(plan["modes"]) == ["plain", "lookup", "auto"]
    assert list(result["modes"]["plain"]["by_category"]) == ["conversation", "prose", "code"]
    assert result["modes"]["auto"]["identical_to_plain"] == {"same": 10, "total": 10}  # five prompts, two passes
    assert result["sampled"]["temperature"] == 0.9
    assert result["sampled"]["modes"]["lookup"]["identical_to_plain"] == {"same": 5, "total": 5}
    assert plan["choice"] in plan["modes"]
    assert plan["costs"]["rows_ms"] == result["rows_ms"]
    assert made.summary["is_reproducible"] is False
    assert made.summary["left_out"] == 0
    assert made.summary["lines"][0].startswith("plain ")
    assert made.summary["lines"][0].endswith("identical 30/30")


def test_its_input_stays_as_it_is(tmp_path: Path, inputs: dict[str, Path]) -> None:
    weights = inputs["quantize"] / "model" / "model.safetensors"
    before = weights.read_bytes()
    made = context(tmp_path / "out", inputs)
    build(1, made)
    assert weights.read_bytes() == before
    assert {path.name for path in made.scratch.iterdir()} == {"bundle"}  # of links, gone with the build


def test_without_generated_conversations_windows_of_text_are_continued(tmp_path: Path, inputs: dict[str, Path]) -> None:
    del inputs["generate"]
    made = context(tmp_path / "out", inputs, num_texts=4, repeats=1)
    build(1, made)
    plain = json.loads((made.out / "evaluate.json").read_text())["modes"]["plain"]
    assert list(plain["by_category"]) == ["prose", "code"]
    assert plain["identical_to_plain"]["total"] == 4


def test_prompts_that_do_not_fit_the_context_are_left_out_and_counted(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = context(tmp_path / "out", inputs, max_tokens=80, repeats=1)
    build(1, made)
    assert made.summary["left_out"] == 3  # windows of 20 and 21 tokens; the conversations' 9 fit
    with pytest.raises(ValueError, match=r"evaluate\.max_tokens=90: no prompt .* context of 96"):
        build(1, context(tmp_path / "none", inputs, max_tokens=90))


def test_a_mode_that_changes_an_answer_fails_the_stage(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.runtime.benchmark.count_identical", lambda *_: {"same": 1, "total": 2})
    with pytest.raises(RuntimeError, match=r"mode plain changed 1 of 2 answers \(greedy answers\).* a bug of the"):
        build(1, context(tmp_path / "out", inputs))


def test_there_must_be_something_to_answer() -> None:
    check(CONFIG, has_generated=True, num_heldout=0)
    check(CONFIG, has_generated=False, num_heldout=1)
    with pytest.raises(ValueError, match=r"nothing to answer .*held out by calibrate: 0"):
        check(CONFIG, has_generated=False, num_heldout=0)
