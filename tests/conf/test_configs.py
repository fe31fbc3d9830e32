"""Every file of the configuration tree composes, resolves, says why it is so and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli import config_directory, expand_home
from pipeline.schema import register

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
CHOICES = [name.removesuffix(".yaml") for name in FILES if "/" in name and not name.startswith("hydra/")]
NEEDED = {
    "target/gguf": ["target.name=x", "target.path=y"],
    "target/hf": ["target.name=x", "target.path=y"],
    "intermediate/checkpoint": ["intermediate.initial.path=x"],
    "experiment/qwen_coder_1_5b": ["target.path=x", "intermediate.initial.path=y"],
    "intermediate/initial/checkpoint": ["intermediate.initial.path=x"],
    "generate/engine/server": ["generate.engine.url=x", "generate.engine.model=y"],
}

Compose = Callable[..., dict[str, Any]]


@pytest.fixture
def composed() -> Iterator[Compose]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def resolved(*overrides: str) -> dict[str, Any]:
            config = compose("config", list(overrides))
            found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
            assert isinstance(found, dict)
            return found

        yield resolved


def override(choice: str) -> str:
    if choice == "intermediate/train/loop":  # a group that is used twice is named with its place
        return "intermediate/train@intermediate.align.train=loop"
    return "=".join(choice.rsplit("/", 1))


def test_this_is_the_tree_that_the_program_reads() -> None:
    assert config_directory() == CONF
    assert len(CHOICES) > 12


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_with_no_value_missing(composed: Compose, choice: str) -> None:
    config = composed(override(choice), *NEEDED.get(choice, []))
    assert set(config) >= {
        "target",
        "calibrate",
        "quantize",
        "quality",
        "generate",
        "eagle",
        "intermediate",
        "evaluate",
        "tracking",
    }


@pytest.mark.parametrize("experiment", [c for c in CHOICES if c.startswith("experiment/")])
@pytest.mark.parametrize("part", ["eagle", "intermediate", "eagle@eagle_intermediate", "evaluate"])
def test_every_experiment_composes_without_one_of_its_parts(composed: Compose, experiment: str, part: str) -> None:
    needed = [each for each in NEEDED.get(experiment, []) if not each.startswith(f"{part}.")]
    config = composed(override(experiment), f"{part}=none", *needed)
    assert config[part.rpartition("@")[2]]["method"] == "none"


def test_the_long_recipe_goes_on_from_an_intermediate_that_it_made(composed: Compose) -> None:
    overrides = ("experiment=smollm2_full", "intermediate/initial=checkpoint", "intermediate.initial.path=MODEL")
    intermediate = composed(*overrides)["intermediate"]
    assert intermediate["initial"]["kind"] == "checkpoint"
    assert intermediate["align"]["lora"]["rank"] is None


def test_the_recipe_with_a_sibling_takes_every_method_for_it(composed: Compose) -> None:
    paths = ("target.path=1.5B.gguf", "intermediate.initial.path=0.5B.gguf")
    config = composed("experiment=qwen_coder_1_5b", *paths, "quantize@intermediate.quantize=rtn")
    assert config["intermediate"]["quantize"]["method"] == "rtn"


@pytest.mark.parametrize("method", [c for c in CHOICES if c.startswith("quantize/")])
@pytest.mark.parametrize("comparison", [c for c in CHOICES if c.startswith("quality/")])
def test_every_method_composes_with_every_comparison(composed: Compose, method: str, comparison: str) -> None:
    config = composed(override(method), override(comparison))
    assert config["quantize"]["method"] == method.removeprefix("quantize/")
    for variant in config["quality"]["variants"].values():
        assert f"quantize/{variant['method']}" in CHOICES


def test_a_home_directory_is_found_in_every_place(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("store", "generate.prompts.path", "eagle.initial", "calibrate.text.dataset", "name")
    places = [f'{key}="~/{key[0]}"' for key in keys]  # Hydra's grammar wants quotes around a tilde
    config: Any = OmegaConf.create(composed(*places))
    expand_home(config)
    found = (config.store, config.generate.prompts.path, config.eagle.initial, config.calibrate.text.dataset)
    assert found == ("/home/me/s", "/home/me/g", "/home/me/e", "/home/me/c")
    assert (config.name, config.bundles) == ("~/n", "bundles")


@pytest.mark.parametrize("name", FILES)
def test_every_file_begins_with_a_sentence_in_words(name: str) -> None:
    lines = [line for line in (CONF / name).read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert len(lines[0].split()) >= 4


@pytest.mark.parametrize(
    "wrong",
    [
        "quantise=gptq",
        "quantize.group=64",
        "quantize.group_size=many",
        "quantize.observer=best",
        "quantize=awq",
        "calibrate.chat.number=3",
        "calibrate.text.source=internet",
        "target.kind=ollama",
        "quality.variant={}",
        "generate.number=3",
        "generate/engine=cloud",
        "eagle=eagle4",
        "intermediate=small",
        "intermediate.phases=[align,distil]",
        "intermediate/initial=svd",
        "intermediate.align.loss=tvd",
        "intermediate.align.lora.dropout=0.1",
        "eagle@eagle_intermediate=eagle4",
        "eagle.unroll=3",
        "eagle.embedding=borrowed",
        "eagle.vocabulary.counts=guessed",
        "eagle.train.precision=fp8",
        "eagle.train.optimizer=sgd",
        "evaluate=twice",
        "evaluate.number=3",
        "evaluate.num_prompts=many",
        "tracking.mode=sometimes",
        "experiment=nothing",
        "seed=many",
    ],
)
def test_an_unknown_key_or_value_fails(composed: Compose, wrong: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed(wrong)


@pytest.mark.parametrize(
    ("method", "foreign"),
    [
        ("quantize=rtn", "quantize.dampening=0.1"),
        ("quantize=keep", "quantize.bits=8"),
        ("quantize=q4_0", "quantize.group_size=64"),
        ("quantize=smoothquant", "quantize.gamma=0.1"),
        ("quantize=flattenquant", "quantize.activations.scope=token"),
        ("quantize=flattenquant", "quantize.weights.bits=4"),
        ("eagle=none", "eagle.unrolls=3"),
        ("intermediate=none", "intermediate.trains_ends=true"),
        ("intermediate=layers", "intermediate.initial.hidden_size=320"),
        ("intermediate=random", "intermediate.initial.layers=[0]"),
        ("evaluate=none", "evaluate.num_prompts=3"),
        ("generate/engine=runtime", "generate.engine.url=x"),
    ],
)
def test_a_key_that_a_method_would_ignore_fails(composed: Compose, method: str, foreign: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed(method, foreign)


def test_the_comparison_by_rounding_uses_the_methods_own_grid(composed: Compose) -> None:
    config = composed("quantize.group_size=64", "quantize.symmetric=true", "quantize.bits=8")
    variant = config["quality"]["variants"]["rtn"]
    assert (variant["group_size"], variant["symmetric"], variant["bits"]) == (64, True, 8)


def test_the_smoke_experiment_asks_for_less_of_everything(composed: Compose) -> None:
    full, smoke = composed(), composed("experiment=smoke")
    assert smoke["target"] == full["target"]
    assert smoke["quantize"] == full["quantize"]
    for group, key in (
        ("chat", "num_samples"),
        ("chat", "response_tokens"),
        ("free", "num_samples"),
        ("text", "num_samples"),
    ):
        assert 0 < smoke["calibrate"][group][key] < full["calibrate"][group][key]
    assert 0 < smoke["generate"]["num_tokens"] < full["generate"]["num_tokens"]
    for key in ("num_prompts", "num_texts", "max_tokens"):
        assert 0 < smoke["evaluate"][key] < full["evaluate"][key]


def test_the_smoke_experiments_budget_is_in_tokens_so_that_its_bundle_is_reproducible(composed: Compose) -> None:
    train = composed("experiment=smoke")["eagle"]["train"]
    assert (train["max_seconds"], train["max_epochs"]) == (None, None)
    assert train["max_tokens"] > 0


def test_the_default_trains_long_enough_and_leaves_time_for_the_rest_of_half_an_hour(composed: Compose) -> None:
    assert 400 <= composed()["eagle"]["train"]["max_seconds"] <= 600


def test_one_feature_is_the_only_difference_of_its_choice(composed: Compose) -> None:
    three, one = composed()["eagle"], composed("eagle=single_feature")["eagle"]
    assert {key for key in three if three[key] != one[key]} == {"feature_layers"}
