"""The stage on a tiny random model that ends its turns often: the runtime, transformers, and kill -9."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.devices import DeviceError
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.scheduler import Scheduler
from pipeline.manifest import Manifest
from pipeline.run import Outcome
from pipeline.stages.engines import RuntimeEngine
from train.data.conversations import read_conversations
from train.data.dialogue import RESPONSES

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("generate_tiny.py")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = [2, *range(240, 259)]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
Generate = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says anything, and one token in thirteen ends a turn."""
    directory, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (np.ones(size) if name.endswith("norm.weight") else 0.2 * rng.standard_normal(size)).astype(np.float32)
        for name, size in sizes.items()
    }
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index + len(SPECIAL) for index, token in enumerate(alphabet)}
    vocabulary |= {token: index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def generate(model: Path) -> Generate:
    """The stage in this process, with changed settings."""
    spec = importlib.util.spec_from_file_location("generate_tiny", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda store, **changes: module.run(store, model, changes)


@pytest.fixture(scope="session")
def whole(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return generate(tmp_path_factory.mktemp("whole"))


def num_generated(manifest: Manifest) -> int:
    """Tokens that the engine wrote in the run that built the artifact."""
    found = re.fullmatch(r"(\d+) tokens in .*", manifest.summary["lines"][-1])
    assert found is not None
    return int(found[1])


def contents(artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artifact.iterdir() if path.name != "manifest.json"}


def test_the_artifact_holds_both_splits_and_their_counts(whole: Outcome) -> None:
    path = whole.artifact.path
    record = json.loads((path / "data.json").read_text())
    for split in ("train", "heldout"):
        found = read_conversations(path, split)
        counts = record["splits"][split]
        assert counts["conversations"] == len(found) > 0
        assert counts["written_tokens"] == sum(int(each.loss_mask().sum()) for each in found)
        assert counts["tokens"] == sum(len(each.token_ids) for each in found)
        temperatures = [f"{each.temperature:g}" for each in found]
        assert record["conversations_by_temperature"][split] == {t: temperatures.count(t) for t in set(temperatures)}
    assert record["splits"]["heldout"]["conversations"] == 6
    assert record["conversations_by_temperature"]["heldout"]["0"] >= 3
    assert record["splits"]["train"]["turns"] > record["splits"]["train"]["conversations"]
    indices = [each.index for split in ("train", "heldout") for each in read_conversations(path, split)]
    assert len(set(indices)) == len(indices)


def test_every_response_is_what_the_runtime_says_to_the_tokens_before_it(whole: Outcome, model: Path) -> None:
    """Answered one at a time by a backend of its own: the tokens are as served, whatever was in flight."""
    backend = CpuBackend(ModelDirectory.open(model), threads=1)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    scheduler = Scheduler(backend, tokenizer, range(1), frozenset(ENDS))
    expected = {}
    for each in read_conversations(whole.artifact.path, "train")[:12]:
        for begin, end in each.spans:
            sampling = SamplingParams(each.temperature, top_p=1.0, seed=3)
            options = GenerationOptions(24, sampling, sample_index=RESPONSES + each.index)
            number = scheduler.submit(Request(each.token_ids[:begin].tolist(), options))
            expected[number] = each.token_ids[begin:end].tolist()
    assert {number: list(answer.token_ids) for number, answer in scheduler.answers()} == expected


def test_the_sample_shows_what_is_learnt(whole: Outcome) -> None:
    text = (whole.artifact.path / "sample.txt").read_text()
    assert text.startswith("<|im_start|>user\n")
    assert "<|im_start|>assistant\n⟦" in text
    assert text.count("⟦") == text.count("⟧") >= 1


def test_times_are_in_the_summary_and_in_no_file(whole: Outcome) -> None:
    summary = whole.artifact.manifest.summary
    assert summary["tokens_per_second"] > 0
    assert summary["lines"][-1].endswith("tokens/s")
    assert "per_second" not in (whole.artifact.path / "data.json").read_text()


def test_the_number_of_sequences_changes_no_byte(generate: Generate, whole: Outcome, tmp_path: Path) -> None:
    other = generate(tmp_path, engine={"num_sequences": 3})
    assert other.artifact.manifest.digest == whole.artifact.manifest.digest
    assert contents(other.artifact.path) == contents(whole.artifact.path)


def test_a_smaller_budget_holds_out_the_same(generate: Generate, whole: Outcome, tmp_path: Path) -> None:
    smaller = generate(tmp_path, num_tokens=2000).artifact.path
    assert [each.token_ids.tolist() for each in read_conversations(smaller, "heldout")] == [
        each.token_ids.tolist() for each in read_conversations(whole.artifact.path, "heldout")
    ]
    trained = {each.index for each in read_conversations(smaller, "train")}
    assert trained < {each.index for each in read_conversations(whole.artifact.path, "train")}


def test_a_larger_budget_goes_on_where_a_smaller_one_ended(
    generate: Generate, whole: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = generate(tmp_path, num_tokens=2000).artifact
    before = contents(smaller.path)
    capsys.readouterr()
    larger = generate(tmp_path).artifact
    assert f"generate               continues {smaller.path}" in capsys.readouterr().out
    assert contents(larger.path) == contents(whole.artifact.path)
    assert contents(smaller.path) == before
    assert num_generated(larger.manifest) < 2500  # of 4000


def test_an_engine_that_stops_at_a_loop_and_one_that_is_cut_there_write_the_same(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.loops.LOOP_TOKENS", 1)  # any token twice within 64: this model's answers are short
    monkeypatch.setattr("train.data.loops.CHECKED_EVERY", 1)
    changes: dict[str, Any] = {"num_tokens": 1500, "num_turns": 1}
    stopped = generate(tmp_path / "a", **changes).artifact
    counted = json.loads((stopped.path / "data.json").read_text())["notes"]
    assert counted["response loops"] > 1
    submit = RuntimeEngine.submit
    monkeypatch.setattr(RuntimeEngine, "submit", lambda self, asked: submit(self, replace(asked, stops_loops=False)))
    cut = generate(tmp_path / "b", **changes).artifact
    assert contents(cut.path) == contents(stopped.path)
    assert num_generated(stopped.manifest) < num_generated(cut.manifest)


def test_a_data_set_with_another_setting_is_not_continued(
    generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path, num_tokens=700)
    generate(tmp_path, num_tokens=800, top_p=0.9)
    generate(tmp_path, num_tokens=600)
    assert "continues" not in capsys.readouterr().out


@pytest.mark.parametrize(("keyed", "found"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_what_device_writes_is_decided_when_the_key_is_made(
    generate: Generate, whole: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyed: str, found: str
) -> None:
    """By the time the engine is opened a GPU may be free that was not, or the other way round."""

    def choose(name: str, weight_bytes: int) -> str:
        if weight_bytes and name == "gpu" != found:
            raise DeviceError("another program has it")
        return found if weight_bytes else keyed

    monkeypatch.setattr("deploy.runtime.devices.choose_backend", choose)
    if keyed == "cpu":
        assert contents(generate(tmp_path, engine={"device": "auto"}).artifact.path) == contents(whole.artifact.path)
    else:
        with pytest.raises(ValueError, match=r"key says that a GPU writes it, .* \(another program has it\)"):
            generate(tmp_path, engine={"device": "auto"})


def test_transformers_writes_a_data_set_too(generate: Generate, tmp_path: Path) -> None:
    engine = {"kind": "transformers", "device": "cpu", "batch_size": 5}
    first = generate(tmp_path / "a", num_tokens=700, engine=engine).artifact
    again = generate(tmp_path / "b", num_tokens=700, engine=engine).artifact
    assert contents(first.path) == contents(again.path)
    assert json.loads((first.path / "data.json").read_text())["engine"] == "transformers"


def test_prompts_of_a_file_are_answered(generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"turns": [f"Question {index}?", "And?"]}) for index in range(20)))
    given = {"share": 1.0, "path": str(path)}
    found = generate(tmp_path / "store", prompts=given, num_tokens=10**6).artifact.path
    record = json.loads((found / "data.json").read_text())
    assert sum(counts["conversations"] for counts in record["splits"].values()) == 20
    assert record["self_written_prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heldout": 10_000, "num_tokens": 500},
            r"all \d+ conversations are held out and none is left to train on",
        ),
        ({"max_tokens": 250}, r"generate\.max_tokens=250 with a prompt exceeds the target's context of 256"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(
    generate: Generate, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}", r"has no user header .*base"),
        ("generation_config.json", '{"eos_token_id": []}', r"the target names no end token"),
    ],
)
def test_a_target_that_cannot_write_conversations_is_told_what_to_do(
    model: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    done = start(tmp_path / "store", tmp_path / "model")
    output, _ = done.communicate(timeout=60)
    assert done.returncode == 1
    assert "ValueError" in output
    assert re.search(message, output), output


def start(store: Path, model: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(store), str(model)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    whole: Outcome, model: Path, tmp_path: Path
) -> None:
    rng, kills, num_shards = random.Random(0), 0, -1
    partial = tmp_path / "store" / "generate"
    while True:
        process = start(tmp_path / "store", model)
        while process.poll() is None and kills < 6:
            found = len(list(partial.glob("*.partial/shard-*.jsonl")))
            if found > num_shards + rng.randrange(3):
                num_shards = found
                process.kill()
                kills += 1
        output, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -9, output
    assert kills >= 3
    (artifact,) = partial.iterdir()
    assert contents(artifact) == contents(whole.artifact.path)
