"""`experiment=smoke` on the real embedded model, as a user runs it: once in full, then what follows from that."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMOKE = "experiment=smoke"
NO_DRAFTER = ("eagle=none", "intermediate=none")
SECOND = {"intermediate", "quantize-intermediate", "measure-intermediate", "eagle-intermediate"}
ALL = {"target", "calibrate", "generate", "eagle-target", *SECOND, "evaluate", "export"} | {
    f"{kind}{which}" for kind in ("quantize", "quality") for which in ("", "-rtn", "-keep", "-q4_0")
}


@pytest.fixture(scope="module")
def place(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the experiment has run once."""
    place = tools.Workplace(tmp_path_factory.mktemp("smoke"))
    assert set(tools.verdicts(place.run(SMOKE))) == ALL
    return place


def quantized_weights(store: Path) -> str:
    """sha256 of the weights by GPTQ in groups of 32; the store may hold other sizes and methods too."""
    for path in store.glob("quantize/*/manifest.json"):
        manifest = json.loads(path.read_text())
        config = manifest["config"]
        if (config["method"], config.get("group_size"), manifest["instance"]) == ("gptq", 32, "quantize"):
            return hashlib.sha256((path.parent / "model" / "model.safetensors").read_bytes()).hexdigest()
    raise AssertionError(f"no such artifact in {store}")


def test_the_bundle_is_sound_and_says_something(place: Any) -> None:
    verified = place.deploy("verify", "bundles/smoke")
    assert verified.returncode == 0, verified.stderr
    said = place.deploy("generate", "bundles/smoke", "-p", "Why is the sky blue?", "-n", "12")
    assert said.returncode == 0, said.stderr
    assert len(re.findall(r"[A-Za-z]{2,}", said.stdout)) >= 3


def test_the_table_has_every_method_and_keep_loses_nothing(place: Any) -> None:
    manifest = json.loads((place.path / "bundles" / "smoke" / "manifest.json").read_text())
    rows = {row["method"]: row for row in manifest["quality"]}
    assert list(rows) == ["source", "gptq (this bundle)", "rtn", "keep", "q4_0"]
    for group in ("prose", "code", "chat"):
        assert rows["source"][f"{group}/kl"] == 0
        assert rows["keep"][f"{group}/kl"] < 0.001
        for method in ("gptq (this bundle)", "rtn", "q4_0"):
            assert 0.001 < rows[method][f"{group}/kl"] < 2


def test_the_head_says_what_it_is_worth_and_for_which_target(place: Any) -> None:
    manifest = json.loads((place.path / "bundles" / "smoke" / "manifest.json").read_text())
    drafter = manifest["components"]["eagle-target"]["drafter"]
    assert drafter["target"] == manifest["provenance"]["stages"]["quantize"]["content"]
    assert drafter["acceptance"]["tau"] > 1
    assert drafter["feature_layers"] == [2, 15, 27]
    inspected = place.deploy("inspect", "bundles/smoke")
    assert f"{drafter['acceptance']['tau']:.2f} tokens a call of the target at 4 drafted" in inspected.stdout


def test_no_document_is_both_calibrated_and_measured_on(place: Any) -> None:
    (file,) = (place.path / "artifacts" / "calibrate").glob("*/samples.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    sources = {split: {s["source"] for s in samples if s["split"] == split} for split in ("calibration", "heldout")}
    assert not sources["calibration"] & sources["heldout"]
    assert {s["group"] for s in samples if s["split"] == "calibration"} == {"prose", "code", "chat", "free"}
    assert {s["group"] for s in samples if s["split"] == "heldout"} == {"prose", "code", "chat"}


def test_a_second_run_reuses_everything_without_torch(tools: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    output = place.run(SMOKE)
    imported = {line.rsplit("|", 1)[-1].strip() for line in output.splitlines() if line.startswith("import time:")}
    assert "hydra" in imported
    assert not {"torch", "transformers", "llmcompressor", "wandb", "matplotlib"} & imported
    lines = "\n".join(line for line in output.splitlines() if not line.startswith("import time:"))
    assert tools.verdicts(lines) == dict.fromkeys(ALL, "reused")


def test_offline_tracking_of_a_reused_run_records_every_artifact(place: Any) -> None:
    before = set((place.path / "runs").iterdir())
    output = place.run(SMOKE, "tracking=offline")
    assert "tracking is off" not in output
    (run,) = set((place.path / "runs").iterdir()) - before
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {event["instance"] for event in events if event["event"] == "artifact"} == ALL


def commands(document: Path) -> list[str]:
    """Lines of a document's code blocks that call `python -m deploy`, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("python -m deploy ")]


def test_the_readmes_and_the_model_cards_commands_run(tools: Any, place: Any) -> None:
    documents = (tools.root / "README.md", place.path / "bundles" / "smoke" / "README.md")
    found = [command for document in documents for command in commands(document)]
    assert len(found) >= 3
    (place.path / "PROMPTS.jsonl").write_text('{"prompt": "Why is the sky blue?"}\n')
    for command in found:
        words = shlex.split(command, comments=True)[3:]
        words = ["bundles/smoke" if word == "BUNDLE" or word.startswith("bundles/") else word for word in words]
        done = place.deploy(*words, said="Hello\n" if words[0] == "chat" else None)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip()


def test_the_file_loads_in_plain_transformers_with_our_logits(place: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from compress.load import load_float32

    directory = place.path / "bundles" / "smoke" / "target"
    ids = torch.randint(0, 49152, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(ids).logits
        assert torch.equal(load_float32(directory)(ids).logits, theirs)


def test_another_group_size_rebuilds_what_depends_on_it_and_says_why(tools: Any, place: Any) -> None:
    said = tools.verdicts(place.run(SMOKE, "quantize.group_size=64", "name=other"))
    built = {instance for instance, verdict in said.items() if verdict != "reused"}
    drafter = {"generate", "eagle-target", *SECOND}  # of other words
    assert built == {"quantize", "quantize-rtn", "quality", "quality-rtn", "evaluate", "export"} | drafter
    assert said["quantize"] == "building: quantize.group_size 32 → 64"
    assert said["quantize-rtn"] == "building: quantize.group_size 32 → 64"
    assert "input quantize changed" in said["quality"]


def test_keep_with_a_twin_makes_a_bundle_that_others_can_load(tools: Any, place: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from compress.load import load_float32

    said = tools.verdicts(
        place.run(SMOKE, "quantize=keep", "quantize.twin=true", "quality=none", *NO_DRAFTER, "name=kept")
    )
    assert said["target"] == said["calibrate"] == "reused"
    verified = place.deploy("verify", "bundles/kept")
    assert verified.returncode == 0, verified.stderr
    bundle = place.path / "bundles" / "kept"
    assert json.loads((bundle / "manifest.json").read_text())["extensions"] == ["weight_min"]
    (source,) = (place.path / "artifacts" / "target").glob("*/model")
    ids = torch.randint(0, 49152, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = torch.log_softmax(load_float32(source)(ids).logits, -1)
        kept = torch.log_softmax(load_float32(bundle / "target")(ids).logits, -1)
        twin = AutoModelForCausalLM.from_pretrained(bundle / "target-w4a16", dtype=torch.float32).eval()(ids).logits
        assert torch.equal(twin, load_float32(bundle / "target-w4a16")(ids).logits)
    kl = (exact.exp() * (exact - kept)).sum(-1).mean()
    twin_kl = (exact.exp() * (exact - torch.log_softmax(twin, -1))).sum(-1).mean()
    assert kl < 0.01 < twin_kl < 2


def test_two_runs_with_one_seed_give_the_same_weights_bit_for_bit(place: Any) -> None:
    place.run(SMOKE, "stage=[target,calibrate,quantize]", "store=second", "quality=none")
    try:
        assert quantized_weights(place.path / "second") == quantized_weights(place.path / "artifacts")
    finally:
        shutil.rmtree(place.path / "second")


def finished(store: Path) -> dict[str, bytes]:
    """The manifest of every artifact that a look-up would find."""
    found = store.glob("*/*/manifest.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in found if not path.parent.suffix}


@pytest.fixture
def killed_store(place: Any) -> Iterator[Path]:
    yield place.path / "killed"
    shutil.rmtree(place.path / "killed", ignore_errors=True)


def test_killed_at_random_moments_a_run_loses_no_finished_stage_and_ends_alike(
    tools: Any, place: Any, killed_store: Path
) -> None:
    place.run(SMOKE, "evaluate=none", "bundles=whole-bundles")  # what is measured is never the same twice
    expected = place.contents("whole-bundles/smoke")
    overrides = (SMOKE, "evaluate=none", f"store={killed_store.name}", "bundles=killed-bundles")
    rng = random.Random(11)
    before: dict[str, bytes] = {}
    for _ in range(6):
        process = place.start(*overrides)
        try:
            process.communicate(timeout=rng.uniform(2, 25))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        after = finished(killed_store)
        assert before.items() <= after.items()
        before = after
    said = tools.verdicts(place.run(*overrides))
    kept = {json.loads(manifest)["instance"] for manifest in before.values()}
    assert kept
    assert {instance for instance, verdict in said.items() if verdict == "reused"} == kept
    assert not [path for path in killed_store.rglob("*") if path.suffix in (".partial", ".replaced")]
    assert place.contents("killed-bundles/smoke") == expected
