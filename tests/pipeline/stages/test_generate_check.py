"""Every bad value of `generate` is refused before any work, by key, value and remedy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli import config_directory
from pipeline.schema import register
from pipeline.stages import generate

SERVER = ("generate/engine=server", "generate.engine.url=http://x/v1", "generate.engine.model=m")


@pytest.fixture
def composed() -> Iterator[Any]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):

        def resolved(*overrides: str) -> dict[str, Any]:
            config = OmegaConf.to_container(compose("config", list(overrides)), resolve=True, enum_to_str=True)
            assert isinstance(config, dict)
            found: dict[str, Any] = config["generate"]
            return found

        yield resolved


@pytest.mark.parametrize("engine", [(), ("generate/engine=transformers",), SERVER])
def test_the_defaults_are_valid(composed: Any, engine: tuple[str, ...]) -> None:
    generate.check(composed(*engine))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.num_tokens=0", r"generate\.num_tokens=0 must be 1 or more"),
        ("generate.num_heldout=0", r"generate\.num_heldout=0 must be 1 or more"),
        ("generate.heldout_greedy_share=1.5", r"generate\.heldout_greedy_share=1\.5 must be from 0 to 1"),
        ("generate.temperatures=[]", r"generate\.temperatures=\[\] is empty; give at least one"),
        ("generate.temperatures=[0.5,-1]", r"generate\.temperatures=-1\.0 must be 0 \(greedy\) or 0\.001 … 100"),
        ("generate.temperatures=[1e-9]", r"generate\.temperatures=1e-09 must be 0"),
        ("generate.top_p=0", r"generate\.top_p=0\.0 must be above 0 and at most 1"),
        ("generate.max_tokens=0", r"generate\.max_tokens=0 must be 1 or more"),
        ("generate.num_turns=0", r"generate\.num_turns=0 must be 1 or more"),
        ("generate.shard_size=0", r"generate\.shard_size=0 must be 1 or more"),
        ("generate.self_written.max_tokens=0", r"generate\.self_written\.max_tokens=0 must be 1 or more"),
        ("generate.self_written.temperature=-1", r"generate\.self_written\.temperature=-1\.0 must be 0"),
        ("generate.self_written.first_words=['Why ']", r"first_words: 'Why ' begins or ends with white space"),
        ("generate.self_written.top_p=2", r"generate\.self_written\.top_p=2\.0 must be above 0"),
        ("generate.prompts.share=-1", r"generate\.prompts\.share=-1\.0 must be from 0 to 1"),
        ("generate.engine.num_sequences=0", r"generate\.engine\.num_sequences=0 must be 1 or more"),
        ("generate.engine.device=tpu", r"generate\.engine\.device=tpu must be auto, cpu or gpu"),
        ("generate.engine.kind=magic", r"generate\.engine\.kind=magic is unknown; use runtime, transformers, server"),
        ("generate=prompts", r"generate\.prompts\.share=1\.0 needs generate\.prompts\.path .* neither is given"),
        ("generate.prompts.path=p.jsonl", r"generate\.prompts\.path=p\.jsonl is not used, .* choose generate=mix or"),
        ("generate.prompts.dataset=d", r"generate\.prompts\.dataset=d is not used"),
    ],
)
def test_a_value_out_of_range_is_refused(composed: Any, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate.check(composed(override))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("concurrency", 0, "must be 1 or more"),
        ("max_retries", -1, "must be 0 or more"),
        ("retry_seconds", -1, "must be 0 or more"),
        ("timeout_seconds", 0, "must be above 0"),
    ],
)
def test_a_servers_values_are_checked(composed: Any, key: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"generate\.engine\.{key}={value}.* {message}"):
        generate.check(composed(*SERVER, f"generate.engine.{key}={value}"))


def test_two_sources_of_prompts_are_refused(composed: Any) -> None:
    with pytest.raises(ValueError, match="both are given; give one"):
        generate.check(composed("generate=mix", "generate.prompts.path=p.jsonl", "generate.prompts.dataset=d"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"generate\.prompts\.path=.*p\.jsonl is not a file"),
        ("", r"p\.jsonl is empty"),
        ('{"prompt": "a"}\n{"turn": "b"}\n', r"p\.jsonl, line 2: needs a"),
        ('{"prompt": "a \\ud83d"}\n', r"p\.jsonl, line 1: holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_prompt_file_is_read_before_any_work(
    composed: Any, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        generate.check(composed("generate=prompts", f"generate.prompts.path={path}"))


@pytest.mark.parametrize(
    "wrong",
    ["generate/engine=magic", "generate.engine.batch_size=3", "generate.writer=me", "generate.temperature=1"],
)
def test_an_unknown_key_or_engine_is_hydras_error(composed: Any, wrong: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed(wrong)


def test_what_changes_no_byte_is_no_key(composed: Any, tmp_path: Path) -> None:
    first = generate.keyed(composed())
    assert generate.keyed(composed("generate.engine.num_sequences=3")) == first
    assert generate.keyed(composed("generate.num_tokens=3")) != first
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}')
    configs = [composed("generate=mix", f"generate.prompts.path={tmp_path / name}") for name in ("a.jsonl", "b.jsonl")]
    assert generate.keyed(configs[0]) == generate.keyed(configs[1])
    assert generate.fingerprint(configs[0]) == generate.fingerprint(configs[1]) != {}
    servers = [composed(*SERVER), composed(*SERVER, "generate.engine.url=http://y/v1", "generate.engine.concurrency=1")]
    assert generate.keyed(servers[0]) == generate.keyed(servers[1])
    assert generate.keyed(servers[0]) != generate.keyed(composed(*SERVER, "generate.engine.model=n"))


def test_a_data_set_in_a_directory_is_keyed_by_its_files(composed: Any, tmp_path: Path) -> None:
    def written(directory: Path, prompt: str) -> Any:
        (directory / "data").mkdir(parents=True)
        (directory / ".cache").mkdir()
        (directory / "README.md").write_text("questions")
        (directory / "data" / "train.jsonl").write_text(f'{{"prompt": "{prompt}"}}')
        (directory / ".cache" / "note").write_text(str(directory))
        return composed("generate=prompts", f"generate.prompts.dataset={directory}")

    first, moved, other = (written(tmp_path / name, prompt) for name, prompt in (("a", "x"), ("b", "x"), ("c", "y")))
    assert sorted(generate.fingerprint(first)) == [
        "generate.prompts.dataset/README.md",
        "generate.prompts.dataset/data/train.jsonl",
    ]
    assert generate.fingerprint(first) == generate.fingerprint(moved)
    assert generate.keyed(first) == generate.keyed(moved)
    assert generate.fingerprint(first) != generate.fingerprint(other)
    assert "datasets" in generate.packages(first)
    assert "datasets" not in generate.packages(composed())
    on_hub = composed("generate=prompts", "generate.prompts.dataset=someone/questions")
    assert generate.fingerprint(on_hub) == {}
    assert generate.keyed(on_hub)["prompts"]["dataset"] == "someone/questions"


@pytest.mark.parametrize("chosen", ["cpu", "gpu"])
def test_the_runtimes_device_is_a_key_where_it_is_a_gpu(
    composed: Any, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setattr("deploy.runtime.devices.choose_backend", lambda name, weight_bytes: chosen)
    on_cpu, on_auto, on_gpu = (
        generate.keyed(composed(f"generate.engine.device={device}")) for device in ("cpu", "auto", "gpu")
    )
    assert "device" not in on_cpu["engine"]
    assert on_gpu["engine"]["device"] == "gpu"
    assert on_auto == (on_gpu if chosen == "gpu" else on_cpu)


def test_a_gpu_asked_for_by_name_must_be_there(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtime.devices.find_driver", lambda: None)
    generate.check(composed("generate.engine.device=auto"))
    with pytest.raises(
        ValueError, match=r"generate\.engine\.device=gpu cannot be used \(there is no NVIDIA driver.*cpu$"
    ):
        generate.check(composed("generate.engine.device=gpu"))


def test_a_device_of_transformers_asked_for_by_name_must_be_there(
    composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cuda(*_sizes: Any, device: Any) -> None:
        raise RuntimeError(f"no {device}")

    monkeypatch.setattr("torch.empty", no_cuda)
    generate.check(composed("generate/engine=transformers"))
    with pytest.raises(
        ValueError, match=r"generate\.engine\.device=cuda:1 cannot be used \(no cuda:1\); use auto, cpu"
    ):
        generate.check(composed("generate/engine=transformers", "generate.engine.device=cuda:1"))


def test_a_servers_key_must_be_set(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keyed = (*SERVER, "generate.engine.api_key_variable=A_SERVERS_KEY")
    with pytest.raises(ValueError, match=r"generate\.engine\.api_key_variable=A_SERVERS_KEY is not set; export it"):
        generate.check(composed(*keyed))
    monkeypatch.setenv("A_SERVERS_KEY", "abc")
    generate.check(composed(*keyed))


def test_the_key_leaves_the_configuration_as_it_was(composed: Any) -> None:
    config = composed()
    before = copy.deepcopy(config)
    generate.keyed(config)
    assert config == before
