"""The whole pipeline on tiny random models in Hugging Face directories: every architecture, every method."""

from __future__ import annotations

import json
import os
import re
import signal
import time
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
    "evaluate.num_prompts=2",
    "evaluate.num_texts=2",
    "evaluate.max_tokens=12",
)
HF = ("target=hf", "target.name=tiny", "target.path=model", *BUDGETS)
# Its user turns do not end either, so prompts are given to it.
DRAFTER = (
    "generate=prompts",
    "generate.prompts.path=prompts.jsonl",
    "generate.num_tokens=1500",
    "generate.num_heldout=4",
    "generate.max_tokens=24",
    "generate.shard_size=16",
    "eagle.vocabulary.size=512",
    "eagle.vocabulary.trim=[256]",
    "eagle.compared_conversations=1",
    "eagle.min_acceptance=0",  # a random model's words cannot be learned
    "eagle.train.max_seconds=null",
    "eagle.train.max_tokens=3000",
    "eagle.train.tokens_per_batch=256",
    "eagle.train.max_length=256",
    "eagle.train.evaluate_every=0.5",
    "eagle.train.checkpoint_every_seconds=0.2",
    "intermediate.initial.num_layers=1",
    "intermediate.vocabulary.size=512",
    "intermediate.vocabulary.trim=[256]",
    "intermediate.min_acceptance=0",
    *(
        f"intermediate.{phase}.train.{setting}"
        for phase in ("pretrain", "align")
        for setting in (
            "max_seconds=null",
            "max_tokens=3000",
            "tokens_per_batch=256",
            "max_length=256",
            "evaluate_every=0.5",
            "checkpoint_every_seconds=0.2",
        )
    ),
    "eagle_intermediate.vocabulary.size=512",
    "eagle_intermediate.vocabulary.trim=[256]",
    "eagle_intermediate.compared_conversations=1",
    "eagle_intermediate.min_acceptance=0",
    "eagle_intermediate.train.max_seconds=null",
    "eagle_intermediate.train.max_tokens=2000",
    "eagle_intermediate.train.tokens_per_batch=256",
    "eagle_intermediate.train.max_length=256",
)
PLAIN = (*HF, "eagle=none", "intermediate=none")


def check_bundle(place: Any) -> dict[str, Any]:
    assert place.deploy("verify", "bundles/tiny").returncode == 0
    said = place.deploy("generate", "bundles/tiny", "-p", "Why?", "-n", "3", "--json")
    assert said.returncode == 0, said.stderr
    assert 1 <= json.loads(said.stdout)["completion_tokens"] <= 3
    manifest = json.loads((place.path / "bundles" / "tiny" / "manifest.json").read_text())
    assert isinstance(manifest, dict)
    return manifest


def write_prompts(path: Path, count: int = 120) -> None:
    lines = [json.dumps({"prompt": f"Tell me about number {index} and why it matters."}) for index in range(count)]
    (path / "prompts.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def trained(tools: Any, tiny_directory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the whole pipeline has run once on a tiny model, and what it said."""
    place = tools.Workplace(tmp_path_factory.mktemp("trained"))
    tiny_directory(place.path / "model", "llama")
    write_prompts(place.path)
    return place, place.run(*HF, *DRAFTER, "seed=3")


def test_a_tiny_model_goes_all_the_way(trained: Any) -> None:
    place, said = trained
    assert "next:   python -m deploy generate bundles/tiny" in said
    manifest = check_bundle(place)
    rows = {row["method"]: row for row in manifest["quality"]}
    assert list(rows) == ["source", "gptq (this bundle)", "rtn", "q4_0"]
    assert rows["source"]["prose/kl"] == 0.0
    assert {key.split("/")[0] for key in rows["source"] if "/" in key} == {"prose", "code"}


def test_the_second_run_reuses_everything(tools: Any, trained: Any) -> None:
    place, _ = trained
    second = tools.verdicts(place.run(*HF, *DRAFTER, "seed=3"))
    assert set(second.values()) == {"reused"}
    assert len(second) == 16


def test_the_head_is_in_the_bundle_with_its_worth_and_the_run_ends_with_it(trained: Any) -> None:
    place, said = trained
    assert re.search(r"^eagle-target  τ 1\.\d\d at 4 drafted tokens \(held-out, greedy\)", said, re.MULTILINE)
    check_head(place, json.loads((place.path / "bundles" / "tiny" / "manifest.json").read_text()))
    report = (place.path / "bundles" / "tiny" / "report.html").read_text()
    assert "Acceptance by drafted position" in report
    assert re.search(r"<mark>[^<]+</mark>", report)


def test_every_mode_is_evaluated_and_the_plan_is_in_the_bundle(trained: Any) -> None:
    place, said = trained
    assert re.search(r"^plain \d+ tok/s, .*auto \d+ tok/s \(\d\.\d\dx\), identical (\d+)/\1$", said, re.MULTILINE)
    bundle = place.path / "bundles" / "tiny"
    assert set(json.loads((bundle / "plan.json").read_text())["modes"]) >= {"plain", "lookup", "eagle", "auto"}
    assert "Where a round's milliseconds go" in (bundle / "report.html").read_text()
    inspected = place.deploy("inspect", "bundles/tiny").stdout
    assert "Plan, as measured on" in inspected
    assert "(fastest)" in inspected


def test_a_head_whose_acceptance_has_collapsed_is_refused_in_one_line(trained: Any) -> None:
    place, _ = trained
    process = place.start(*HF, *DRAFTER, "seed=3", "eagle.min_acceptance=0.9")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(r"accepted 0\.\d+ of the time, below eagle\.min_acceptance=0\.9; train longer", line)
    assert "Traceback" not in output


def check_head(place: Any, manifest: dict[str, Any]) -> None:
    """The bundle's head belongs to the quantize artifact, and its run compared the features."""
    (quantized,) = (
        found
        for path in (place.path / "artifacts" / "quantize").glob("*/manifest.json")
        if (found := json.loads(path.read_text()))["instance"] == "quantize"
    )
    drafter = manifest["components"]["eagle-target"]["drafter"]
    assert drafter["target"] == quantized["content"]
    assert drafter["draft_vocab_size"] in (256, 512)
    assert len(drafter["acceptance"]["by_position"]) == 4
    heads = (place.path / "artifacts" / "eagle").glob("*/manifest.json")
    (built,) = (path for path in heads if json.loads(path.read_text())["instance"] == "eagle-target")
    assert {path.name for path in built.parent.iterdir()} == {"head", "history.json", "manifest.json"}
    summary = json.loads(built.read_text())["summary"]
    assert summary["features"]["reference_equal_bits"]
    assert summary["is_reproducible"]


MODES = ("chain", "cascade", "cascade-lookup")


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_every_use_of_the_intermediate_gives_the_text_of_the_target_alone(trained: Any, temperature: str) -> None:
    place, _ = trained
    asked = ("generate", "bundles/tiny", "-p", "Why is it so?", "-n", "24", "--temperature", temperature, "--json")
    plain, *drafted = (json.loads(place.deploy(*asked, "--mode", mode).stdout) for mode in ("plain", *MODES))
    assert plain["text"]
    assert [found["text"] for found in drafted] == [plain["text"]] * len(MODES)


def test_the_evaluation_runs_every_use_of_the_intermediate(trained: Any) -> None:
    place, _ = trained
    (path,) = (place.path / "artifacts" / "evaluate").glob("*/evaluate.json")
    modes = json.loads(path.read_text())["modes"]
    assert {mode: modes[mode]["identical_to_plain"]["same"] for mode in MODES} == dict.fromkeys(MODES, 4)


def test_the_intermediate_and_its_head_are_in_the_bundle_each_bound_to_what_it_drafts_for(trained: Any) -> None:
    place, said = trained
    for role in ("intermediate", "eagle-intermediate"):
        assert re.search(rf"^{role}  τ \d\.\d\d at 4 drafted tokens \(held-out, greedy\)", said, re.MULTILINE)
    bundle = place.path / "bundles" / "tiny"
    components = json.loads((bundle / "manifest.json").read_text())["components"]
    built = (json.loads(path.read_text()) for path in (place.path / "artifacts").glob("quantize/*/manifest.json"))
    contents = {manifest["instance"]: manifest["content"] for manifest in built}
    drafters = {role: components[role]["drafter"] for role in components if "drafter" in components[role]}
    assert drafters["intermediate"]["target"] == drafters["eagle-target"]["target"] == contents["quantize"]
    assert drafters["eagle-intermediate"]["target"] == contents["quantize-intermediate"]
    ids = json.loads((bundle / "intermediate" / "draft_vocabulary.json").read_text())["ids"]
    assert drafters["intermediate"]["draft_vocab_size"] == len(ids) and len(ids) in (256, 512)
    report = (bundle / "report.html").read_text()
    assert all(f"<h3>{role}</h3>" in report for role in drafters)


RANDOM = ("num_layers=2", "hidden_size=32", "intermediate_size=64", "num_heads=2", "num_kv_heads=1", "head_dim=16")
FROM_NOISE = ("intermediate=random", *(f"intermediate.initial.{size}" for size in RANDOM))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "phases"),
    [
        ((*FROM_NOISE, "intermediate.align.loss=distribution"), {"pretrain", "align"}),
        (("intermediate=checkpoint", "intermediate.initial.path=sibling"), {"align"}),  # with adapters
        (
            (
                "intermediate=checkpoint",
                "intermediate.initial.path=FILE",
                "intermediate.phases=[]",
                "quantize@intermediate.quantize=keep",
            ),
            set(),
        ),
    ],
    ids=["from noise, by distribution", "a sibling, by adapters", "a file as it is, on its own grid"],
)
def test_an_intermediate_of_any_origin_goes_all_the_way(
    tools: Any, tiny_directory: Callable[..., Path], trained: Any, start: tuple[str, ...], phases: set[str]
) -> None:
    place, _ = trained
    if not (place.path / "sibling").exists():
        tiny_directory(place.path / "sibling", "qwen2", hidden_size=32, tie_word_embeddings=True)
    asked = tuple(each.replace("FILE", str(tools.embedded_file())) for each in start)
    kept = tuple(each for each in DRAFTER if each != "intermediate.initial.num_layers=1")
    place.run(*HF, *kept, *asked, "seed=3", "name=other", "quality=none")
    assert place.deploy("verify", "bundles/other").returncode == 0
    history = (place.path / "bundles" / "other").resolve().parent / "manifest.json"
    digest = json.loads(history.read_text())["inputs"]["intermediate"]["digest"]
    assert set(json.loads((place.path / "artifacts" / "intermediate" / digest / "history.json").read_text())) == phases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "budget", "checkpoints", "written"),
    [
        ("eagle-target", "eagle", "eagle.train", "checkpoints", "head"),
        ("intermediate", "intermediate", "intermediate.align.train", "checkpoints/align", "model"),
    ],
)
def test_a_training_that_is_killed_goes_on_and_ends_in_the_same_drafter(
    tools: Any,
    tiny_directory: Callable[..., Path],
    tmp_path: Path,
    stage: str,
    kind: str,
    budget: str,
    checkpoints: str,
    written: str,
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    write_prompts(tmp_path)
    asked = (*HF, *DRAFTER, "quality=none", f"stage={stage}", f"{budget}.max_tokens=30000")
    place.run(*asked, "store=whole")
    (whole,) = (tmp_path / "whole" / kind).glob(f"*/{written}")
    process = place.start(*asked)
    wait_for(lambda: list((tmp_path / "artifacts").glob(f"{kind}/*.scratch/{checkpoints}/checkpoint-*[0-9]")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    said = place.run(*asked)
    assert "training goes on from" in said
    (resumed,) = (tmp_path / "artifacts" / kind).glob(f"*/{written}")
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in resumed.iterdir()} == names >= {"config.json", "model.safetensors"}
    for name in names:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert (resumed.parent / "history.json").read_bytes() == (whole.parent / "history.json").read_bytes()


def wait_for(is_there: Callable[[], Any], process: Any) -> None:
    end = time.monotonic() + 300
    while not is_there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


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
    place.run(*PLAIN, "quality=none")
    manifest = check_bundle(place)
    assert manifest["components"]["target"]["architecture"] == model_type


W4A8 = ("quantize=smoothquant", "quantize.weights.bits=4", "quantize.weights.group_size=32", "quantize.alpha=[0.5]")
STATIC = ("quantize=smoothquant", "quantize.activations.scope=tensor", "quantize.solver=rtn")
SPLIT = ("quantize=flattenquant", "quantize.int4_share=0.5", "quantize.twin=true")


@pytest.mark.parametrize(
    ("method", "word"),
    [
        pytest.param(SPLIT, "input_flatten", id="flattenquant"),
        pytest.param(("quantize=smoothquant",), None, id="W8A8", marks=pytest.mark.slow),
        pytest.param(STATIC, None, id="static", marks=pytest.mark.slow),
        pytest.param(W4A8, "packed", id="W4A8", marks=pytest.mark.slow),
    ],
)
def test_methods_that_quantize_inputs_go_all_the_way(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path, method: tuple[str, ...], word: str | None
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    place.run(*PLAIN, *method, "quality=none")
    manifest = check_bundle(place)
    told = manifest["provenance"]["vllm"]
    assert told["loads"] is (word is None)
    assert word is None or word in told["obstacle"]
    assert ("target-w4a16" in manifest["components"]) == (word == "input_flatten")
    assert "inputs" in manifest["components"]["target"]["precision"]
    assert "Inputs of linear layers are quantized as well." in (tmp_path / "bundles" / "tiny" / "README.md").read_text()
    assert "Layers whose inputs are quantized" in (tmp_path / "bundles" / "tiny" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", [("quantize=smoothquant",), SPLIT], ids=["smoothquant", "flattenquant"])
def test_a_head_learns_from_a_target_with_quantized_inputs(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path, method: tuple[str, ...]
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    write_prompts(tmp_path)
    kept = [each for each in DRAFTER if not each.startswith(("intermediate.", "eagle_intermediate."))]
    place.run(*HF, *kept, *method, "seed=3", "quality=none", "intermediate=none")
    check_head(place, check_bundle(place))


@pytest.mark.slow
def test_a_base_model_without_a_chat_template_is_told_what_to_set(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    (tiny_directory(tmp_path / "model", "llama") / "chat_template.jinja").unlink()
    process = place.start(*PLAIN, "quality=none", "calibrate.chat.num_heldout=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "calibrate.chat.num_samples=0 calibrate.chat.num_heldout=0" in output
    assert "Traceback" not in output
    place.run(*PLAIN, "quality=none")
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
    place.run(*PLAIN, *texts, "quality=none")
    assert "text/perplexity" in check_bundle(place)["quality"][0]
    (tmp_path / "texts.jsonl").rename(tmp_path / "moved.jsonl")
    again = tools.verdicts(place.run(*PLAIN, *texts[:1], "calibrate.text.path=moved.jsonl", "quality=none"))
    assert again["calibrate"] == "reused"


@pytest.mark.slow
def test_offline_tracking_leaves_a_run_to_synchronise_without_a_network(
    tools: Any, tiny_directory: Callable[..., Path], tmp_path: Path
) -> None:
    place = tools.Workplace(tmp_path)
    tiny_directory(tmp_path / "model", "llama")
    output = place.run(*PLAIN, "tracking=offline")
    assert "tracking is off" not in output
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events[-1] == {**events[-1], "event": "finish", "status": "finished"}
    assert {event["instance"] for event in events if event["event"] == "artifact"} >= {"target", "quantize", "export"}
