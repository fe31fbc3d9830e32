"""The whole pipeline on tiny random models in Hugging Face directories: every architecture, every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A random model hardly ever ends a turn, so it does not converse with itself here.
BUDGETS = (
    "calibrate.chat.num_samples=0",
    "calibrate.chat.num_heldout=0",
    "calibrate.free.num_samples=2",
    "calibrate.free.num_tokens=6",
    "calibrate.text.num_samples=2",
    "calibrate.text.num_heldout=1",
    "calibrate.sequence_length=64",
)
HF = ("target=hf", "target.name=tiny", "target.path=model", *BUDGETS)


def check_bundle(place: Any) -> dict[str, Any]:
    assert place.deploy("verify", "bundles/tiny").returncode == 0
    said = place.deploy("generate", "bundles/tiny", "-p", "Why?", "-n", "3", "--json")
    assert said.returncode == 0, said.stderr
    assert 1 <= json.loads(said.stdout)["completion_tokens"] <= 3
    manifest = json.loads((place.path / "bundles" / "tiny" / "manifest.json").read_text())
    assert isinstance(manifest, dict)
    return manifest


def test_a_tiny_model_goes_all_the_way_and_the_second_run_reuses_it(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    first = place.run(*HF, "seed=3")
    assert "next:   python -m deploy generate bundles/tiny" in first
    manifest = check_bundle(place)
    rows = {row["method"]: row for row in manifest["quality"]}
    assert list(rows) == ["source", "gptq (this bundle)", "rtn", "q4_0"]
    assert rows["source"]["prose/kl"] == 0.0
    assert {key.split("/")[0] for key in rows["source"] if "/" in key} == {"prose", "code"}
    second = tools.verdicts(place.run(*HF, "seed=3"))
    assert set(second.values()) == {"reused"}
    assert len(second) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64}),
    ],
)
def test_every_architecture_goes_all_the_way(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", model_type, **changes)
    place.run(*HF, "quality=none")
    manifest = check_bundle(place)
    assert manifest["components"]["target"]["architecture"] == model_type


@pytest.mark.slow
def test_a_base_model_without_a_chat_template_is_told_what_to_set(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    (tiny_directory(tmp_path / "model", "llama") / "chat_template.jinja").unlink()
    process = place.start(*HF, "quality=none", "calibrate.chat.num_heldout=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "calibrate.chat.num_samples=0 calibrate.chat.num_heldout=0" in output
    assert "Traceback" not in output
    place.run(*HF, "quality=none")
    check_bundle(place)


@pytest.mark.slow
def test_texts_from_a_file_take_the_place_of_pythons_own(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    lines = [
        {"text": f"Chapter {index}. " + "The quick brown fox jumps over the lazy dog. " * 30} for index in range(20)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    texts = ("calibrate.text.source=file", "calibrate.text.path=texts.jsonl")
    place.run(*HF, *texts, "quality=none")
    assert "text/perplexity" in check_bundle(place)["quality"][0]
    (tmp_path / "texts.jsonl").rename(tmp_path / "moved.jsonl")
    again = tools.verdicts(place.run(*HF, *texts[:1], "calibrate.text.path=moved.jsonl", "quality=none"))
    assert again["calibrate"] == "reused"


@pytest.mark.slow
def test_offline_tracking_leaves_a_run_to_synchronise_without_a_network(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    output = place.run(*HF, "tracking=offline")
    assert "tracking is off" not in output
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events[-1] == {**events[-1], "event": "finish", "status": "finished"}
    assert {event["instance"] for event in events if event["event"] == "artifact"} >= {"target", "quantize", "export"}
