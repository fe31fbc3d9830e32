"""What of the intermediate's configuration enters a key, and what is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from deploy.formats.architectures import ModelShape
from pipeline.cli import config_directory
from pipeline.graph import Stage, order_stages
from pipeline.schema import register
from pipeline.stages.graph import build_graph
from pipeline.stages.intermediate import check_vocabularies, planned_shape, text_packages

Graph = Callable[..., dict[str, Stage]]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


TWO_PHASES = "intermediate.phases=[pretrain,align]"


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):

        def stages(*overrides: str) -> dict[str, Stage]:
            config: Any = compose("config", [f"bundles={tmp_path / 'bundles'}", *overrides])
            return {stage.instance: stage for stage in order_stages(build_graph(config))}

        yield stages


@pytest.fixture
def sibling(tmp_path: Path) -> Callable[..., str]:
    """Where a model of another configuration lies: the check before work reads no weights of it."""

    def make(**changes: Any) -> str:
        (tmp_path / "sibling").mkdir()
        (tmp_path / "sibling" / "config.json").write_text(json.dumps(CONFIG | changes))
        return f"intermediate.initial.path={tmp_path / 'sibling'}"

    return make


def refuse(stage: Stage, message: str) -> None:
    assert stage.check is not None
    with pytest.raises(ValueError, match=message):
        stage.check(stage.config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["intermediate.initial.num_layers=31"], r"intermediate\.initial\.num_layers=31 must lie between 1 and 30"),
        (["intermediate.initial.lens_tokens=0"], r"initial\.lens_tokens=0 must be 1 or more; 20000 is usual"),
        (["intermediate.initial.layers=[0]"], r"intermediate\.initial\.layers=\[0\] with num_layers=6: give one"),
        (
            ["intermediate.initial.num_layers=null", "intermediate.initial.layers=[0,30]"],
            r"layers=\[0, 30\] must name different ones of 0 to 29",
        ),
        (
            ["intermediate=random", "intermediate.initial.hidden_size=300"],
            r"hidden_size=300 is no multiple of 32.*use 320",
        ),
        (["intermediate=random", "intermediate.initial.intermediate_size=900"], r"intermediate_size=900 .*use 928"),
        (["intermediate=random", "intermediate.initial.head_dim=40"], r"num_heads·head_dim=200 .*use 224"),
        (
            ["intermediate=random", *(f"intermediate.initial.{key}" for key in ("head_dim=24", "num_heads=20"))],
            r"head_dim=24 is no multiple of 16.*use 32",
        ),
        (["intermediate=random", "intermediate.initial.num_kv_heads=2"], r"num_kv_heads=2 does not divide num_heads=5"),
        (["intermediate=random", "intermediate.initial.num_layers=0"], r"initial\.num_layers=0 must be 1 or more"),
        (["intermediate=random", "intermediate.phases=[]"], r"starts from noise must be trained"),
        (
            ["intermediate=random", "intermediate.phases=[align]", "intermediate.align.lora.rank=4"],
            r"starts from noise must be trained, all of it",
        ),
        (
            ["intermediate=random", "intermediate.initial.embedding=random", "intermediate.trains_ends=false"],
            r"trains_ends=false would leave the embedding noise",
        ),
        (["intermediate.phases=[align,pretrain]"], r"phases=\['align', 'pretrain'\] must be .* in this order"),
        (["intermediate.phases=[align,align]"], r"phases=\['align', 'align'\] must be"),
        (["intermediate.vocabulary.size=50000"], r"intermediate\.vocabulary\.size=50000 must lie between"),
        (["intermediate.vocabulary.size=4096"], r"intermediate\.vocabulary\.trim=\[2048, 4096\] must be below .*=4096"),
        (["intermediate.num_drafted=0"], r"intermediate\.num_drafted=0 must be 1 or more"),
        (["intermediate.min_acceptance=1"], r"intermediate\.min_acceptance=1.*below 1"),
        (["intermediate.align.lora.rank=0"], r"intermediate\.align\.lora=.* must be 1 or more"),
        (["intermediate.align.train.max_seconds=null"], r"set one or more of intermediate\.align\.train\.max_seconds"),
        (
            [TWO_PHASES, "intermediate.pretrain.train.clip=0"],
            r"intermediate\.pretrain\.train\.clip=0.* must be above 0",
        ),
        (
            [TWO_PHASES, "intermediate.pretrain.text.source=file"],
            r"source=file needs intermediate\.pretrain\.text\.path",
        ),
        (
            [TWO_PHASES, *(f"intermediate.pretrain.text.{key}" for key in ("source=file", "path=nowhere.txt"))],
            r"intermediate\.pretrain\.text\.path=nowhere\.txt is not a file",
        ),
        ([TWO_PHASES, "intermediate.pretrain.text.source=dataset"], r"needs intermediate\.pretrain\.text\.dataset"),
        (["generate.heldout_greedy_share=0"], r"acceptance is measured on greedy ones"),
    ],
)
def test_values_that_make_no_sense_are_refused(graph: Graph, overrides: list[str], message: str) -> None:
    refuse(graph(*overrides)["intermediate"], message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("intermediate.quantize.bits=3", r"intermediate\.quantize\.bits=3 is not supported"),
        ("intermediate.quantize.group_size=128", r"intermediate\.quantize\.group_size=128 does not divide"),
        ("quantize@intermediate.quantize=keep", r"keep takes a GGUF file's own grid.*use quantize@intermediate"),
        ("intermediate.quantize.calibration=[poems]", r"intermediate\.quantize\.calibration=\['poems'\]"),
    ],
)
def test_a_grid_that_it_cannot_have_is_refused(graph: Graph, override: str, message: str) -> None:
    refuse(graph(override)["quantize-intermediate"], message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eagle_intermediate.feature_layers=[7]", r"eagle_intermediate\.feature_layers=\[7\] .* from 0 to 6"),
        ("eagle_intermediate.unrolls=0", r"eagle_intermediate\.unrolls=0 must be 1 or more"),
        ("eagle_intermediate.train.max_seconds=null", r"eagle_intermediate\.train\.max_seconds"),
    ],
)
def test_its_head_is_checked_against_its_planned_shape(graph: Graph, override: str, message: str) -> None:
    refuse(graph(override)["eagle-intermediate"], message)


def test_a_model_that_reads_less_than_the_target_is_refused(graph: Graph, sibling: Callable[..., str]) -> None:
    stages = graph("intermediate=checkpoint", sibling(max_position_embeddings=512))
    refuse(stages["intermediate"], r"reads 512 tokens and the target 8192; name a model whose context is as long")


def test_a_model_that_does_not_exist_is_named_by_its_own_key(graph: Graph) -> None:
    with pytest.raises(ValueError, match=r"intermediate\.initial\.path=\./none is neither a directory nor a hub id"):
        graph("intermediate=checkpoint", "intermediate.initial.path=./none")


def test_a_model_without_weights_is_named_by_its_own_key(graph: Graph, sibling: Callable[..., str]) -> None:
    stages = graph("intermediate=checkpoint", sibling())
    refuse(stages["intermediate-source"], r"intermediate\.initial\.path=.* has no \*\.safetensors file")


def test_another_tokenizer_is_refused_with_a_token_that_differs() -> None:
    ours = {"a": 0, "b": 1, "c": 2}
    check_vocabularies(lambda: ours, lambda: {**ours, "d": 3})
    for theirs in ({"a": 0, "b": 2, "c": 1}, {"a": 0, "c": 2}):
        with pytest.raises(ValueError, match=r"another tokenizer than the target .* 'b' is 1 and (2|missing)"):
            check_vocabularies(lambda: ours, lambda theirs=theirs: theirs)


def digest_inputs(stage: Stage) -> Any:
    return json.dumps([stage.config, sorted(stage.inputs), stage.seed])


@pytest.mark.parametrize(
    "override",
    [
        "intermediate.align.train.checkpoint_every_seconds=7",
        "intermediate.pretrain.train.prefetch=1",
        "intermediate.min_acceptance=0.2",
        "intermediate.vocabulary.trim=[100]",
        "intermediate.align.lora.alpha=5",  # without a rank there are no adapters
        "quantize@intermediate.quantize=rtn",
    ],
)
def test_what_changes_nothing_of_the_training_is_no_key_of_it(graph: Graph, override: str) -> None:
    before, after = (graph(TWO_PHASES, *others)["intermediate"] for others in ([], [override]))
    assert digest_inputs(before) == digest_inputs(after)


@pytest.mark.parametrize(
    "override",
    [
        "intermediate.initial.num_layers=5",
        "intermediate.initial.lens_tokens=5",
        "intermediate.trains_ends=true",
        "intermediate.align.lora.rank=4",
        "intermediate.align.loss=distribution",
        "intermediate.pretrain.train.max_seconds=5",
        "intermediate.vocabulary.size=9000",
        "calibrate.text.heldout_share=0.3",
    ],
)
def test_what_changes_the_training_is_a_key_of_it(graph: Graph, override: str) -> None:
    before, after = (graph(TWO_PHASES, *others)["intermediate"] for others in ([], [override]))
    assert digest_inputs(before) != digest_inputs(after)


def test_a_phase_that_does_not_run_is_no_part_of_the_key(graph: Graph) -> None:
    alone = ("intermediate.phases=[align]",)
    other = graph(*alone, "intermediate.pretrain.train.max_seconds=5", "calibrate.text.heldout_share=0.3")
    assert digest_inputs(other["intermediate"]) == digest_inputs(graph(*alone)["intermediate"])


def test_the_trimmed_sizes_reach_the_measurement_and_the_head_above_it(graph: Graph) -> None:
    before, after = graph(), graph("intermediate.vocabulary.trim=[100]")
    changed = [name for name in before if digest_inputs(before[name]) != digest_inputs(after[name])]
    assert changed == ["measure-intermediate"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),
        (["intermediate.initial.lens_tokens=null"], False),
        (["intermediate.initial.lens_tokens=null", "intermediate.align.loss=distribution"], True),
        (["intermediate=random"], False),
    ],
)
def test_a_fitted_head_and_the_distribution_need_the_quantized_target(
    graph: Graph, overrides: list[str], expected: bool
) -> None:
    assert ("quantize" in graph(*overrides)["intermediate"].inputs) == expected


@pytest.mark.parametrize("lens_tokens", ["20", "null"])
def test_a_fitted_head_is_a_matrix_of_its_own(graph: Graph, lens_tokens: str) -> None:
    target = ModelShape.from_config(CONFIG)
    assert target.tied_embeddings
    config = graph(f"intermediate.initial.lens_tokens={lens_tokens}", "intermediate.initial.num_layers=1")
    assert planned_shape(config["intermediate"].config, target, target).tied_embeddings == (lens_tokens == "null")


def test_another_models_layers_come_from_a_stage_of_its_own(graph: Graph, sibling: Callable[..., str]) -> None:
    stages = graph("intermediate=checkpoint", sibling())
    assert stages["intermediate"].inputs["source"].instance == "intermediate-source"
    assert stages["intermediate-source"].name == "target"
    assert not re.search("sibling", json.dumps([stage.config for stage in stages.values()]))


def test_the_path_of_a_text_file_is_no_key_but_its_content_is(graph: Graph, tmp_path: Path) -> None:
    found = []
    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        (tmp_path / name).write_text(content)
        key = "intermediate.pretrain.text"
        stage = graph(TWO_PHASES, f"{key}.source=file", f"{key}.path={tmp_path / name}")["intermediate"]
        assert stage.fingerprint is not None
        found.append((stage.config, stage.fingerprint()))
    assert found[0] == found[1] != found[2]


def test_the_files_of_a_data_set_and_a_files_format_are_keys_of_the_training(graph: Graph, tmp_path: Path) -> None:
    key = "intermediate.pretrain.text"
    (tmp_path / "set").mkdir()
    for name in ("a.txt", "b.jsonl", "set/c.jsonl"):
        (tmp_path / name).write_text("x")
    stage = graph(TWO_PHASES, f"{key}.source=dataset", f"{key}.dataset={tmp_path / 'set'}")["intermediate"]
    assert stage.fingerprint is not None
    assert set(stage.fingerprint()) == {f"{key}.dataset/c.jsonl"}
    formats = []
    for name in ("a.txt", "b.jsonl"):
        stage = graph(TWO_PHASES, f"{key}.source=file", f"{key}.path={tmp_path / name}")["intermediate"]
        formats.append(stage.config["pretrain"]["text"]["format"])
    assert formats == ["text", "jsonl"]


def test_only_a_data_set_that_is_read_needs_its_library() -> None:
    text = {"source": "dataset", "path": None, "dataset": "owner/set"}
    config = {"phases": ["pretrain"], "pretrain": {"text": text}}
    assert text_packages(config) == ("datasets",)
    assert text_packages({**config, "phases": ["align"]}) == ()
    assert text_packages({**config, "pretrain": {"text": {**text, "source": "python"}}}) == ()


def test_without_its_head_the_intermediate_stays(graph: Graph) -> None:
    assert set(graph()) - set(graph("eagle@eagle_intermediate=none")) == {"eagle-intermediate"}


def test_the_default_is_at_most_a_quarter_of_the_target_by_the_weights_that_a_token_reads(graph: Graph) -> None:
    target = ModelShape.from_config(
        CONFIG
        | {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        }
    )
    config = graph()["intermediate"].config
    shape = planned_shape(config, target, target)

    def read(shape: ModelShape, head_rows: int) -> float:
        from deploy.formats.architectures import linear_layers

        layers = sum(layer.num_out * layer.num_in for layer in linear_layers(shape)) * (4 + 32 / 32 * 2) / 8
        return layers + head_rows * shape.hidden_size * (8 + 32 / 32) / 8

    assert read(shape, config["vocabulary"]["size"]) <= read(target, target.vocab_size) / 4
