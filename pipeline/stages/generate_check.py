"""What `generate` may ask for; every mistake is named by key, value and remedy before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_COUNT: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "must be 1 or more")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value <= 1, "must be from 0 to 1")
_TOP_P: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value <= 1, "must be above 0 and at most 1")
_TEMPERATURE: tuple[Callable[[Any], bool], str] = (
    lambda value: value == 0 or 1e-3 <= value <= 100,
    "must be 0 (greedy) or 0.001 … 100",
)
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "must be above 0")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "must be 0 or more")

_RANGES = {
    "num_tokens": _COUNT,
    "num_heldout": _COUNT,
    "heldout_greedy_share": _SHARE,
    "top_p": _TOP_P,
    "max_tokens": _COUNT,
    "num_turns": _COUNT,
    "shard_size": _COUNT,
    "self_written.max_tokens": _COUNT,
    "self_written.temperature": _TEMPERATURE,
    "self_written.top_p": _TOP_P,
    "prompts.share": _SHARE,
}
_DEVICE: tuple[Callable[[Any], bool], str] = (lambda value: value in ("auto", "cpu", "gpu"), "must be auto, cpu or gpu")
_ENGINE_RANGES: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "runtime": {"num_sequences": _COUNT, "device": _DEVICE},
    "transformers": {"batch_size": _COUNT},
    "server": {
        "concurrency": _COUNT,
        "max_retries": _NOT_NEGATIVE,
        "retry_seconds": _NOT_NEGATIVE,
        "timeout_seconds": _POSITIVE,
    },
}


def check_values(config: dict[str, Any]) -> None:
    """Raises ValueError for the first value of `generate` that is out of its range or at odds with another."""
    for key, allowed in _RANGES.items():
        _check(f"generate.{key}", _value(config, key), allowed)
    if not config["temperatures"]:
        raise ValueError("generate.temperatures=[] is empty; give at least one, e.g. [0.0, 0.8]")
    for temperature in config["temperatures"]:
        _check("generate.temperatures", temperature, _TEMPERATURE)
    for words in config["self_written"]["first_words"]:
        if words != words.strip():
            raise ValueError(
                f"generate.self_written.first_words: {words!r} begins or ends with white space; leave it out, for the"
                " target's next word brings its own"
            )
    kind = config["engine"]["kind"]
    if kind not in _ENGINE_RANGES:
        raise ValueError(f"generate.engine.kind={kind} is unknown; use {', '.join(_ENGINE_RANGES)}")
    for key, allowed in _ENGINE_RANGES[kind].items():
        _check(f"generate.engine.{key}", config["engine"][key], allowed)
    _check_prompts(config["prompts"])


def check_engine(engine: dict[str, Any]) -> None:
    """Raises ValueError for a device asked for by name that is not usable, and for a server's key that is not set."""
    if engine["kind"] == "runtime" and engine["device"] == "gpu":
        from deploy.runtime.devices import DeviceError, choose_backend

        try:
            choose_backend("gpu", 0)
        except DeviceError as error:
            raise ValueError(f"generate.engine.device=gpu cannot be used ({error.problem}); use auto or cpu") from error
    elif engine["kind"] == "transformers" and engine["device"] not in ("auto", "cpu"):
        from train.data.engines.transformers_engine import choose_device

        choose_device(engine["device"])
    elif engine["kind"] == "server":
        from pipeline.stages.engines import server_settings

        server_settings(engine).headers()


def _check_prompts(prompts: dict[str, Any]) -> None:
    named = [key for key in ("path", "dataset") if prompts[key]]
    if prompts["share"] > 0 and len(named) != 1:
        given = "both are given" if named else "neither is given"
        raise ValueError(
            f"generate.prompts.share={prompts['share']} needs generate.prompts.path or generate.prompts.dataset, and"
            f" {given}; give one"
        )
    if prompts["share"] == 0 and named:
        raise ValueError(
            f"generate.prompts.{named[0]}={prompts[named[0]]} is not used, because generate.prompts.share=0; choose"
            " generate=mix or generate=prompts"
        )


def _value(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _check(key: str, value: Any, allowed: tuple[Callable[[Any], bool], str]) -> None:
    is_valid, words = allowed
    if not is_valid(value):
        raise ValueError(f"{key}={value} {words}")
