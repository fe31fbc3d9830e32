"""What of calibrate enters its key, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.stages import calibrate

WORDS = 40
CONFIG: dict[str, Any] = {
    "sequence_length": 64,
    "chat": {"num_samples": 0, "num_heldout": 0, "temperature": 1.0},
    "free": {"num_samples": 0, "temperature": 1.0},
    "text": {
        "source": "python",
        "path": None,
        "dataset": None,
        "dataset_split": "train",
        "column": "text",
        "num_samples": 6,
        "num_heldout": 2,
        "heldout_share": 0.3,
    },
}


NO_TEXT = CONFIG["text"] | {"num_samples": 0, "num_heldout": 0}
TINY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
}


def config(**text: Any) -> dict[str, Any]:
    return {**CONFIG, "text": CONFIG["text"] | text}


def test_the_key_of_pythons_own_texts_has_all_but_the_path() -> None:
    expected = {key: value for key, value in CONFIG["text"].items() if key != "path"}
    assert calibrate.keyed(config()) == {**CONFIG, "text": expected}
    assert sorted(calibrate.packages(config())) == ["jinja2", "numpy", "python", "tokenizers"]
    assert calibrate.fingerprint(config()) == {}


def test_a_data_set_enters_the_key_by_its_files_and_its_library(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    named = config(source="dataset", dataset=str(tmp_path))
    assert "dataset" not in calibrate.keyed(named)["text"]
    assert set(calibrate.fingerprint(named)) == {"calibrate.text.dataset/a.jsonl"}
    assert "datasets" in calibrate.packages(named)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 101.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^calibrate\.free\.temperature=.* must be 0\.001 … 100$"):
        calibrate.check({**config(), "free": {"temperature": temperature}})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    model = tmp_path / "target" / "model"
    model.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tmp_path / "target"


def test_the_samples_of_a_file_are_the_same_under_another_name(target: Path, tmp_path: Path) -> None:
    written = []
    texts = [" ".join(f"w{(line * word) % WORDS}" for word in range(80)) for line in range(1, 31)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
        named = config(source="file", path=str(tmp_path / name))
        context = make_context(target, tmp_path / f"out-{name}", calibrate.keyed(named))
        calibrate.build(named["text"], 1, context)
        written.append((context.out / "samples.jsonl").read_bytes())
    assert written[0] == written[1]
    splits = [json.loads(line)["split"] for line in written[0].splitlines()]
    assert splits == ["calibration"] * 6 + ["heldout"] * 2


def test_what_ends_a_text_is_the_targets_own_list(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the tokenizer's end token beside it: the target stage has put that into the list, if it is one."""
    model = target / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).save_pretrained(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w3"}')
    rules = []

    def write_nothing(_writer: Any, _vocabulary: Any, rule: Any, _budget: Any, **_seed: Any) -> list[list[int]]:
        rules.append(rule)
        return []

    monkeypatch.setattr("compress.calibration.generate.write_free_texts", write_nothing)
    free = {"num_samples": 1, "num_tokens": 4, "temperature": 1.0, "top_p": 0.9, "drop_share": 0.0}
    context = make_context(target, tmp_path / "out", CONFIG | {"free": free} | {"text": NO_TEXT})
    calibrate.build(NO_TEXT, 1, context)
    assert [rule.end_ids for rule in rules] == [{5, 7}]


def make_context(target: Path, out: Path, keyed: dict[str, Any]) -> Any:
    @contextmanager
    def progress(total: int, label: str, unit: str) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda count: None)

    out.mkdir()
    return SimpleNamespace(
        stage="calibrate",
        inputs={"target": target},
        out=out,
        config=keyed,
        seed=3,
        summary={},
        progress=progress,
        tracker=SimpleNamespace(summary=lambda stage, values: None),
    )
