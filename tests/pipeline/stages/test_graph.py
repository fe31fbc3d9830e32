"""The graph that a configuration becomes: which stages, from which inputs, and which keys a change reaches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from deploy.runtime.sampling import SamplingParams
from pipeline.cli import config_directory
from pipeline.graph import Stage, order_stages
from pipeline.manifest import Key
from pipeline.schema import register
from pipeline.stages.eagle import feature_layers
from pipeline.stages.eagle_schema import TrainConfig
from pipeline.stages.graph import MAX_SEED, build_graph
from tests.tiny_llama import TINY_LLAMA
from train.loop.settings import TrainSettings

Graph = Callable[..., dict[str, Stage]]
METHODS = ("", "-rtn", "-keep", "-q4_0")
SECOND = ("intermediate", "quantize-intermediate", "measure-intermediate", "eagle-intermediate")
DRAFTER = ("generate", "eagle-target", *SECOND)
NO_DRAFTER = ("eagle=none", "intermediate=none")
END = ("evaluate", "export")


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):

        def stages(*overrides: str) -> dict[str, Stage]:
            bundles = f"bundles={tmp_path / 'bundles'}"
            found = order_stages(build_graph(compose("config", [bundles, *overrides])))  # type: ignore[arg-type]
            return {stage.instance: stage for stage in found}

        yield stages


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def keys(stages: dict[str, Stage]) -> dict[str, str]:
    """Digests as a run would compute them, had every stage's content the digest of its key."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        inputs = {role: found[source.instance] for role, source in stage.inputs.items()}
        key = Key(stage.name, stage.version, stage.config, stage.seed, inputs, {}, dict.fromkeys(stage.packages, "1"))
        found[name] = key.digest
    return found


def changed(graph: Graph, *overrides: str) -> set[str]:
    before, after = keys(graph()), keys(graph(*overrides))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_default_has_one_quantize_and_one_quality_for_each_method(graph: Graph) -> None:
    stages = graph()
    expected = {"target", "calibrate", *DRAFTER, *END}
    expected |= {f"{kind}{which}" for kind in ("quantize", "quality") for which in METHODS}
    assert set(stages) == expected
    assert list(stages)[:2] == ["target", "calibrate"]
    assert list(stages)[-1] == "export"


def test_each_stage_reads_what_it_needs(graph: Graph) -> None:
    stages = graph()
    inputs = {name: {role: source.instance for role, source in stage.inputs.items()} for name, stage in stages.items()}
    assert inputs["target"] == {}
    assert inputs["calibrate"] == {"target": "target"}
    assert inputs["quantize"] == {"target": "target", "calibrate": "calibrate"}
    for which in METHODS[1:]:
        assert inputs[f"quantize{which}"] == {"target": "target"}
    for which in METHODS:
        expected = {"target": "target", "calibrate": "calibrate", "quantize": f"quantize{which}"}
        assert inputs[f"quality{which}"] == expected
    assert inputs["generate"] == {"target": "target", "model": "quantize"}
    assert inputs["eagle-target"] == {"target": "target", "quantize": "quantize", "generate": "generate"}
    models = {name: name for name in ("target", "calibrate", "quantize", *DRAFTER)}
    assert inputs["intermediate"] == {"target": "target", "generate": "generate", "quantize": "quantize"}
    assert inputs["quantize-intermediate"] == {"target": "intermediate", "calibrate": "calibrate"}
    read = ("target", "quantize", "generate", "intermediate", "quantize-intermediate")
    assert inputs["measure-intermediate"] == {name: name for name in read}
    above = {"quantize": "quantize-intermediate", "measure": "measure-intermediate"}
    assert inputs["eagle-intermediate"] == {"target": "target", "generate": "generate", **above}
    assert inputs["evaluate"] == models
    assert inputs["export"] == {name: name for name in stages if name != "export"}


def test_a_licence_is_the_bundles_alone(graph: Graph) -> None:
    assert changed(graph, "target.licence=mit") == {"export"}


def test_only_what_is_random_has_the_seed(graph: Graph) -> None:
    seeded = [name for name, stage in graph("seed=5").items() if stage.seed == 5]
    assert seeded == ["calibrate", "generate", "eagle-target", "intermediate", "eagle-intermediate", "evaluate"]


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63])
def test_a_seed_that_some_generator_does_not_take_is_refused(graph: Graph, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed={seed} is out of range; use a number from 0 to 2147483647$"):
        graph(f"seed={seed}")


def test_the_greatest_seed_is_one_that_every_generator_takes(graph: Graph) -> None:
    assert graph(f"seed={MAX_SEED}")["calibrate"].seed == MAX_SEED
    np.random.RandomState(MAX_SEED + 1000)  # as accelerate.utils.set_seed seeds process 1000
    np.random.default_rng(MAX_SEED)
    torch.Generator().manual_seed(MAX_SEED + 1)
    SamplingParams(seed=MAX_SEED)


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (["quantize=rtn"], "rtn"),
        (["quantize=rtn", "quantize.group_size=64"], "rtn"),
        (["quantize=keep"], "keep"),
        (["quantize=keep", "quantize.twin=true"], "keep"),
        (["quantize=q4_0"], "q4_0"),
    ],
)
def test_the_bundles_own_method_is_not_compared_with_itself(graph: Graph, overrides: list[str], left_out: str) -> None:
    stages = graph(*overrides)
    assert f"quantize-{left_out}" not in stages
    assert f"quality-{left_out}" not in stages
    assert len(stages) == 16


def test_keep_is_left_out_where_there_is_no_file_with_a_grid(graph: Graph, model_directory: Path) -> None:
    stages = graph("target=hf", "target.name=x", f"target.path={model_directory}")
    quantized = {name for name in stages if name.startswith("quantize")}
    assert quantized == {"quantize", "quantize-rtn", "quantize-q4_0", "quantize-intermediate"}


def test_keep_as_the_bundles_method_is_refused_there(graph: Graph, model_directory: Path) -> None:
    stage = graph("target=hf", "target.name=x", f"target.path={model_directory}", "quantize=keep")["quantize"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"quantize=keep takes a GGUF file's own grid, and target\.path=.* is none"):
        stage.check(stage.config)


def test_another_group_size_reaches_its_methods_and_what_depends_on_them(graph: Graph) -> None:
    expected = {"quantize", "quantize-rtn", "quality", "quality-rtn", *DRAFTER, *END}
    assert changed(graph, "quantize.group_size=64") == expected


def test_more_conversations_reach_calibrated_methods_and_every_measurement(graph: Graph) -> None:
    qualities = {f"quality{which}" for which in METHODS}
    assert changed(graph, "calibrate.chat.num_samples=3") == {"calibrate", "quantize", *END, *DRAFTER, *qualities}


def test_another_seed_reaches_what_is_calibrated_or_measured(graph: Graph) -> None:
    qualities = {f"quality{which}" for which in METHODS}
    assert changed(graph, "seed=1") == {"calibrate", "quantize", *END, *DRAFTER, *qualities}


@pytest.mark.parametrize(
    "override",
    [
        "store=/elsewhere",
        "threads=1",
        "tracking=offline",
        "force=[quantize]",
        "generate.engine.num_sequences=8",
        "eagle.train.feature_cache_gb=0",
        "eagle.train.checkpoint_every_seconds=5",
        "eagle.train.prefetch=1",
    ],
)
def test_what_changes_no_byte_reaches_no_key(graph: Graph, override: str) -> None:
    assert changed(graph, override) == set()


@pytest.mark.parametrize(
    ("override", "reached"),
    [
        ("generate.num_tokens=1000", {*DRAFTER, *END}),
        ("generate.writer=target", {*DRAFTER, *END}),
        ("eagle=single_feature", {"eagle-target", *END}),
        ("eagle.unrolls=5", {"eagle-target", *END}),
        ("eagle.vocabulary.size=4097", {"eagle-target", *END}),
        ("eagle.train.max_seconds=60", {"eagle-target", *END}),
        ("eagle.min_acceptance=0.2", {"export"}),
        ("evaluate.num_prompts=3", {*END}),
        ("evaluate=none", {*END}),
        ("quality=none", {*(f"{kind}{which}" for kind in ("quantize", "quality") for which in METHODS[1:]), "export"}),
    ],
)
def test_a_change_reaches_what_it_decides_and_what_depends_on_it(
    graph: Graph, override: str, reached: set[str]
) -> None:
    assert changed(graph, override) == reached


def test_the_plain_targets_words_can_be_learned_from_but_features_stay_the_quantized_targets(graph: Graph) -> None:
    stages = graph("generate.writer=target")
    assert stages["generate"].inputs["model"].instance == "target"
    assert stages["eagle-target"].inputs["quantize"].instance == "quantize"


def test_without_an_evaluation_nothing_measures_speed(graph: Graph) -> None:
    assert set(graph()) - set(graph("evaluate=none")) == {"evaluate"}


def test_without_a_drafter_the_target_alone_is_evaluated(graph: Graph) -> None:
    assert set(graph(*NO_DRAFTER)["evaluate"].inputs) == {"target", "calibrate", "quantize"}


def test_without_a_drafter_nothing_is_generated(graph: Graph) -> None:
    assert set(graph()) - set(graph(*NO_DRAFTER)) == set(DRAFTER)


def test_another_name_reaches_export_alone(graph: Graph) -> None:
    assert changed(graph, "name=other") == {"export"}


def test_the_path_of_a_text_file_is_no_key_but_its_content_is(graph: Graph, tmp_path: Path) -> None:
    found = []
    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        (tmp_path / name).write_text(content)
        stage = graph("calibrate.text.source=file", f"calibrate.text.path={tmp_path / name}")["calibrate"]
        assert stage.fingerprint is not None
        found.append((stage.config, stage.fingerprint()))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_targets_fingerprint_is_its_content(graph: Graph, model_directory: Path) -> None:
    arguments = ("target=hf", "target.name=x", f"target.path={model_directory}")
    first = graph(*arguments)["target"].fingerprint()  # type: ignore[misc]
    (model_directory / "config.json").write_text("{ }")
    assert graph(*arguments)["target"].fingerprint() != first  # type: ignore[misc]


READ_BY = {"smoothquant": {"target", "calibrate"}, "flattenquant": {"target", "calibrate", "sites"}}


@pytest.mark.parametrize(
    ("override", "is_shared"),
    [
        ("quantize.int4_share=0.5", True),
        ("quantize.solver=rtn", True),
        ("quantize.criterion=ratio", True),
        ("quantize.dampening=0.1", True),
        ("quantize.beta=1.5", False),
        ("quantize.threshold=mean", False),
        ("quantize.weights.group_size=32", False),
        ("quantize.num_samples=8", False),
        ("quantize.alpha=0.5", False),
    ],
)
def test_shares_and_solvers_read_the_same_measured_sites(graph: Graph, override: str, is_shared: bool) -> None:
    first, other = graph("quantize=flattenquant"), graph("quantize=flattenquant", override)
    assert (first["sites"].config == other["sites"].config) == is_shared
    assert first["quantize"].config != other["quantize"].config
    assert first["export"].inputs["sites"] is first["sites"]
    assert "sites" not in graph("quantize=smoothquant")


@pytest.mark.parametrize("method", ["smoothquant", "flattenquant"])
def test_methods_that_quantize_inputs_calibrate_and_are_compared_with_the_default_rounding(
    graph: Graph, method: str
) -> None:
    stages = graph(f"quantize={method}")
    assert set(stages["quantize"].inputs) == READ_BY[method]
    assert "llmcompressor" in stages["quantize"].packages
    assert (stages["quantize-rtn"].config["bits"], stages["quantize-rtn"].config["group_size"]) == (4, 32)
    for stage in stages.values():
        if stage.check is not None:
            stage.check(stage.config)


@pytest.mark.parametrize("method", ["smoothquant", "flattenquant"])
def test_the_intermediate_may_quantize_its_inputs_too(graph: Graph, method: str) -> None:
    stage = graph(f"quantize@intermediate.quantize={method}")["quantize-intermediate"]
    assert stage.check is not None
    stage.check(stage.config)
    assert set(stage.inputs) == READ_BY[method]
    bad = graph(f"quantize@intermediate.quantize={method}", "intermediate.quantize.dampening=0")[
        "quantize-intermediate"
    ]
    assert bad.check is not None
    with pytest.raises(ValueError, match=r"intermediate\.quantize\.dampening=0"):
        bad.check(bad.config)


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("smoothquant", "quantize.alpha=[]", r"quantize\.alpha=\[\] must be one or more numbers from 0 to 1"),
        ("smoothquant", "quantize.alpha=[0.5,1.5]", r"quantize\.alpha=\[0\.5, 1\.5\] must be"),
        ("smoothquant", "quantize.weights.bits=3", r"quantize\.weights\.bits=3 is not supported; use 4 or 8"),
        ("smoothquant", "quantize.weights.group_size=48", r"weights\.group_size=48 .*32, 64 or 128, or null"),
        ("smoothquant", "quantize.weights.group_size=128", r"quantize\.weights\.group_size=128 does not divide"),
        ("smoothquant", "quantize.activations.bits=6", r"quantize\.activations\.bits=6 is not supported; use 4 or 8"),
        ("smoothquant", "quantize.calibration=[poems]", r"calibrate makes no poems"),
        ("smoothquant", "quantize.num_samples=0", r"quantize\.num_samples=0 must be 1 or more"),
        ("flattenquant", "quantize.alpha=2", r"quantize\.alpha=2.* must be from 0 to 1; null leaves smoothing out"),
        ("flattenquant", "quantize.beta=0", r"quantize\.beta=0.* must be above 0"),
        ("flattenquant", "quantize.max_expansion=0.9", r"quantize\.max_expansion=0\.9 must be 1 \(nothing is split\)"),
        ("flattenquant", "quantize.gamma=0.2", r"quantize\.int4_share=0\.25 and quantize\.gamma=0\.2: .* give one"),
        (
            "flattenquant",
            "quantize.int4_share=null",
            r"quantize\.int4_share=None and quantize\.gamma=None: .* give one",
        ),
        ("flattenquant", "quantize.int4_share=48.29", r"quantize\.int4_share=48\.29 must be from 0 .* to 1"),
        ("flattenquant", "quantize.weights.group_size=16", r"weights\.group_size=16 is not supported"),
        ("flattenquant", "quantize.dampening=0", r"quantize\.dampening=0.* must be above 0"),
    ],
)
def test_values_that_make_no_sense_for_quantized_inputs_are_refused(
    graph: Graph, method: str, override: str, message: str
) -> None:
    stages = graph(f"quantize={method}", override)
    for instance in ("sites", "quantize") if method == "flattenquant" else ("quantize",):
        check = stages[instance].check
        assert check is not None
        with pytest.raises(ValueError, match=message):
            check(stages[instance].config)


@pytest.mark.parametrize("method", ["smoothquant", "flattenquant"])
def test_an_observer_by_calibrated_inputs_is_refused_for_rounding(graph: Graph, method: str) -> None:
    overrides = (f"quantize={method}", "quantize.solver=rtn", "quantize.weights.observer=imatrix_mse")
    stage = graph(*overrides)["quantize"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"weights\.observer=imatrix_mse needs quantize\.solver=gptq"):
        stage.check(stage.config)


@pytest.mark.parametrize(
    ("instance", "override", "message"),
    [
        ("quantize", "quantize.bits=3", r"quantize\.bits=3 is not supported; use 4 or 8"),
        ("quantize", "quantize.group_size=48", r"quantize\.group_size=48 is not supported; use 32, 64 or 128"),
        ("quantize", "quantize.dampening=0", r"quantize\.dampening=0.* must be above 0"),
        ("quantize", "quantize.num_samples=0", r"quantize\.num_samples=0 must be 1 or more"),
        (
            "quantize",
            "quantize.calibration=[chat,poems]",
            r"calibrate makes no poems \(it makes: chat, free, prose, code",
        ),
        (
            "quantize-rtn",
            "quantize.observer=imatrix_mse",
            r"quality\.variants\.rtn\.observer=imatrix_mse .*use minmax or mse",
        ),
        ("calibrate", "calibrate.chat.num_samples=-1", r"calibrate\.chat\.num_samples=-1 must be 0 or more"),
        ("calibrate", "calibrate.free.top_p=1.5", r"calibrate\.free\.top_p=1\.5 must be above 0 and at most 1"),
        ("calibrate", "calibrate.chat.temperature=0", r"calibrate\.chat\.temperature=0.* must be 0\.001 … 100"),
        ("calibrate", "calibrate.text.heldout_share=1", r"calibrate\.text\.heldout_share=1.* below 1"),
        ("calibrate", "calibrate.sequence_length=8", r"calibrate\.sequence_length=8 is too short"),
        ("calibrate", "calibrate.text.source=file", r"calibrate\.text\.source=file needs calibrate\.text\.path"),
        ("calibrate", "calibrate.text.source=dataset", r"source=dataset needs calibrate\.text\.dataset"),
        ("generate", "generate.num_tokens=0", r"generate\.num_tokens=0 must be 1 or more"),
        ("eagle-target", "eagle.vocabulary.size=50000", r"vocabulary\.size=50000 .* the target's vocabulary of 49152"),
        ("eagle-target", "eagle.vocabulary.size=0", r"eagle\.vocabulary\.size=0 must lie between 1 and"),
        ("eagle-target", "eagle.vocabulary.trim=[8192]", r"trim=\[8192\] must be below eagle\.vocabulary\.size=8192"),
        ("eagle-target", "eagle.feature_layers=[2,15,31]", r"feature_layers=\[2, 15, 31\] .* from 0 to 30"),
        ("eagle-target", "eagle.feature_layers=[-32]", r"feature_layers=\[-32\] must name different layers"),
        ("eagle-target", "eagle.feature_layers=[30,-1]", r"feature_layers=\[30, -1\] must name different layers"),
        ("eagle-target", "eagle.feature_layers=[]", r"feature_layers=\[\] must name different layers"),
        ("eagle-target", "generate.heldout_greedy_share=0.01", r"greedy_share=0\.01 of generate\.num_heldout=64 is no"),
        ("eagle-target", "eagle.unrolls=0", r"eagle\.unrolls=0 must be 1 or more"),
        ("eagle-target", "eagle.step_decay=0", r"eagle\.step_decay=0.* must be above 0"),
        ("eagle-target", "eagle.min_acceptance=1", r"eagle\.min_acceptance=1.* below 1"),
        ("eagle-target", "eagle.train.max_seconds=null", r"set one or more of eagle\.train\.max_seconds"),
        ("eagle-target", "eagle.train.learning_rate=-1", r"eagle\.train\.learning_rate=-1.* must be above 0"),
        ("evaluate", "evaluate.num_prompts=-1", r"evaluate\.num_prompts=-1 must be 0 or more"),
        ("evaluate", "evaluate.max_tokens=0", r"evaluate\.max_tokens=0 must be 1 or more"),
        ("evaluate", "evaluate.repeats=0", r"evaluate\.repeats=0 must be 1 or more"),
        ("evaluate", "evaluate.temperature=0", r"evaluate\.temperature=0.* must be 0\.001 … 100"),
        ("calibrate", "calibrate.sequence_length=20000", r"calibrate\.sequence_length=20000 exceeds the .* of 8192"),
        (
            "calibrate",
            "calibrate.chat.response_tokens=8192",
            r"calibrate\.chat\.response_tokens=8192 behind a prompt of 48 or more exceeds the .* of 8192",
        ),
        ("calibrate", "calibrate.free.num_tokens=8192", r"calibrate\.free\.num_tokens=8192 behind .* of 8192"),
        ("generate", "generate.max_tokens=8130", r"generate\.max_tokens=8130 behind a prompt of 64 or more exceeds"),
        ("evaluate", "evaluate.max_tokens=8192", r"evaluate\.max_tokens=8192 behind a prompt of 1 or more exceeds"),
        ("export", "name=a/b", r"name=a/b is not a plain file name"),
        ("export", "bundles=/proc/nowhere", r"bundles=/proc/nowhere: not writable .*set bundles= to a writable"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_the_stage_that_has_them(
    graph: Graph, instance: str, override: str, message: str
) -> None:
    stage = graph(override)[instance]
    assert stage.check is not None
    with pytest.raises(ValueError, match=message):
        stage.check(stage.config)


def test_a_head_to_start_from_enters_the_key_by_its_contents_and_not_by_its_place(
    graph: Graph, write_head: Any, tmp_path: Path
) -> None:
    found = []
    for name in ("a", "b"):
        stage = graph(f"eagle.initial={write_head(tmp_path / name)}")["eagle-target"]
        assert stage.check is not None
        assert stage.fingerprint is not None
        stage.check(stage.config)
        found.append((stage.config, stage.fingerprint()))
    assert found[0] == found[1]
    assert set(found[0][1]) == {"eagle.initial/config.json", "eagle.initial/model.safetensors"}
    plain = graph()["eagle-target"]
    assert plain.fingerprint is not None
    assert (plain.config, plain.fingerprint()) == (found[0][0], {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, r"eagle\.initial=.*head: .*no such directory; name the directory of a head for this model"),
        ({"intermediate_size": 768}, r"has a layer of intermediate_size=768, and a head for this model has 1536"),
        (
            {"feature_layers": (2, 15, 29)},
            r"has feature_layers=\[2, 15, 29\], and eagle\.feature_layers is",
        ),
        (
            {"norm_before_residual": False},
            r"has norm_before_residual=False, and eagle\.norm_before_residual is True",
        ),
    ],
)
def test_a_head_that_cannot_be_gone_on_with_is_refused(
    graph: Graph, write_head: Any, tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    if changes is not None:
        write_head(tmp_path / "head", **changes)
    stage = graph(f"eagle.initial={tmp_path / 'head'}")["eagle-target"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=message):
        stage.check(stage.config)


def test_a_head_in_the_bundle_that_the_run_replaces_is_refused(graph: Graph, write_head: Any, tmp_path: Path) -> None:
    head = write_head(tmp_path / "bundles" / "mine" / "eagle-target")
    stage = graph(f"eagle.initial={head}", "name=mine")["eagle-target"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"lies in .*bundles/mine, which this run replaces; give .* another name="):
        stage.check(stage.config)
    further = graph(f"eagle.initial={head}", "name=further")["eagle-target"]
    assert further.check is not None
    further.check(further.config)


def test_no_samples_to_calibrate_on_is_refused(graph: Graph) -> None:
    budgets = [f"calibrate.{group}.num_samples=0" for group in ("chat", "free", "text")]
    stage = graph(*budgets)["quantize"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"calibrate makes no samples \(it makes: none\)"):
        stage.check(stage.config)


@pytest.mark.parametrize(
    "overrides",
    [("evaluate.num_prompts=0", "evaluate.num_texts=0"), (*NO_DRAFTER, "evaluate.num_texts=0")],
)
def test_an_evaluation_without_prompts_is_refused(graph: Graph, overrides: tuple[str, ...]) -> None:
    stage = graph(*overrides)["evaluate"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"evaluate has nothing to answer .* or set evaluate=none"):
        stage.check(stage.config)


def test_nothing_held_out_is_refused(graph: Graph) -> None:
    stage = graph("calibrate.chat.num_heldout=0", "calibrate.text.num_heldout=0")["calibrate"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"num_heldout are both 0; quality needs one"):
        stage.check(stage.config)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        (None, 30, (2, 15, 27)),
        (None, 2, (0, 1)),
        ([-1], 30, (30,)),
        ([27, 2, 15], 30, (2, 15, 27)),
        ([0, -2], 2, (0, 1)),
    ],
)
def test_feature_layers_count_from_either_end_and_ascend(
    layers: list[int] | None, num_layers: int, expected: tuple[int, ...]
) -> None:
    assert feature_layers({"feature_layers": layers}, num_layers) == expected


def test_the_training_settings_of_the_configuration_are_those_of_the_loop() -> None:
    assert set(TrainConfig.__dataclass_fields__) == set(TrainSettings.__dataclass_fields__)


def test_the_default_passes_every_check(graph: Graph) -> None:
    for stage in graph().values():
        if stage.check is not None:
            stage.check(stage.config)


def test_a_directory_in_the_place_of_the_bundles_link_is_refused(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "bundles" / "mine").mkdir(parents=True)
    stage = graph("name=mine")["export"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"mine exists and is not a link of ours; move it or choose another name"):
        stage.check(stage.config)


def test_configs_of_stages_hold_no_paths(graph: Graph, tmp_path: Path) -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for each in value.values():
                yield from texts(each)
        elif isinstance(value, str):
            yield value

    for stage in graph(f"store={tmp_path}").values():
        assert not [text for text in texts(stage.config) if "/" in text], stage.instance


@pytest.mark.parametrize(
    ("overrides", "stage", "message"),
    [
        ((), "calibrate", r"no user header .* conversations; set calibrate\.chat\.num_samples=0"),
        ((), "generate", r"no user header .* prompts; give some: generate=prompts"),
        (("calibrate.chat.num_samples=0", "calibrate.chat.num_heldout=0"), "calibrate", None),
        (("generate=prompts", "generate.prompts.path=prompts.jsonl"), "generate", None),
    ],
)
def test_a_base_model_is_asked_for_nothing_that_it_cannot_write(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], stage: str, message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    monkeypatch.chdir(tmp_path)
    small = (
        *("calibrate.sequence_length=64", "calibrate.chat.response_tokens=32", "calibrate.free.num_tokens=32"),
        *("generate.max_tokens=32", "generate.self_written.max_tokens=16"),
    )
    made = graph("target=hf", "target.name=x", f"target.path={tmp_path / 'model'}", *small, *overrides)[stage]
    assert made.check is not None
    if message is None:
        made.check(made.config)
        return
    with pytest.raises(ValueError, match=message):
        made.check(made.config)
