"""generate: `shard-*.jsonl`, conversations that the target took part in, `data.json` (counts) and `sample.txt`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages import text_sources
from pipeline.stages.chat_check import check_prompts

if TYPE_CHECKING:
    from train.data.chat_format import ChatFormat
    from train.data.prompts import PromptRecord
    from train.data.recipe import Recipe

UNKEYED_ENGINE_KEYS = frozenset(
    {
        "num_sequences",
        "device",
        "url",
        "concurrency",
        "max_retries",
        "retry_seconds",
        "timeout_seconds",
        "api_key_variable",
    }
)
"""Where and how fast an engine works is no part of what it writes."""
LOG_SECONDS = 5.0


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `generate` that enters the stage's key: no paths, nothing that changes no byte.

    The runtime's GPU backend rounds otherwise than its CPU's, so where a GPU writes, that is part of the key.
    """
    from deploy.runtime.devices import choose_backend

    prompts = text_sources.keyed(config["prompts"], _source(config["prompts"]))
    engine = {key: value for key, value in config["engine"].items() if key not in UNKEYED_ENGINE_KEYS}
    if config["engine"]["kind"] == "runtime":
        device = config["engine"]["device"]
        if (choose_backend("auto", 0) if device == "auto" else device) == "gpu":
            engine["device"] = "gpu"
    return {**config, "prompts": prompts, "engine": engine}


def continues(smaller: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a data set of `smaller` is the beginning of one of `config`: all is equal but the number of tokens.

    What a shard holds does not depend on how many follow it (train/data/generation.py). So the runtime's data sets
    grow; other engines may round otherwise from one device, or server, to the next, which no key tells.
    """
    is_smaller = smaller["num_tokens"] < config["num_tokens"] and config["engine"]["kind"] == "runtime"
    return is_smaller and {**smaller, "num_tokens": config["num_tokens"]} == config


def packages(config: dict[str, Any]) -> tuple[str, ...]:
    """Distributions whose version enters the stage's key."""
    also = ("torch", "transformers") if config["engine"]["kind"] == "transformers" else ()
    return ("tokenizers", "jinja2", *also, *text_sources.packages(_source(config["prompts"])))


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    """Digests of the prompt file or of the data set's files, where these lie on this machine."""
    return text_sources.fingerprint(config["prompts"], _source(config["prompts"]), "generate.prompts")


def _source(prompts: dict[str, Any]) -> str:
    """What `prompts` are read from, as text_sources names it."""
    return "file" if prompts["path"] else "dataset" if prompts["dataset"] else "none"


def check(config: dict[str, Any]) -> None:
    """Raises ValueError on values out of range, an engine that cannot be used and a prompt file that cannot.

    A server is asked when the stage begins: until the target is quantized there is nothing that it could serve. Its
    key must be there, and so must a device that is asked for by name.
    """
    from pipeline.stages.generate_check import check_engine, check_values

    check_values(config)
    check_engine(config["engine"])
    if config["prompts"]["share"] > 0 and config["prompts"]["path"]:
        _records(config)


def build(config: dict[str, Any], threads: int | None, context: BuildContext) -> None:
    """Generates what is missing of the data set.

    config: the whole of `generate`; the context's is what `keyed` made of it. inputs: target, and as `model` the
    artifact whose model writes.
    """
    from deploy.formats.model_dir import ModelDirectory
    from pipeline.stages.engines import open_engine
    from train.data.chat_format import ChatFormat
    from train.data.generation import DataGenerator
    from train.data.prompts import Openings
    from train.data.shards import ShardDirectory

    model_dir = context.inputs["model"] / "model"
    with ModelDirectory.open(model_dir) as files:
        end_ids, context_length = files.eos_token_ids, files.shape.context_length
    if not end_ids:
        raise ValueError("the target names no end token (eos_token_id in generation_config.json); add it there")
    chat = ChatFormat.open(context.inputs["target"] / "model", end_ids)
    recipe = _recipe(config, context_length, context.seed)
    _check_fit(config, recipe, chat)
    openings = Openings(_records(config), config["prompts"]["share"], context.seed)
    shards = ShardDirectory(context.out)
    num_missing = max(config["num_tokens"] - shards.num_tokens(), 0)
    is_on_gpu = context.config["engine"].get("device") == "gpu"  # as `keyed` found it, whatever is free by now
    engine = open_engine(config["engine"], model_dir, chat, seed=context.seed, threads=threads, is_on_gpu=is_on_gpu)
    with context.progress(num_missing, f"conversations by {config['engine']['kind']}", "tokens") as bar:
        meter = _Meter(context)

        def count(num_tokens: int) -> None:
            bar.update(num_tokens)
            meter.count(num_tokens)

        DataGenerator(chat, recipe, openings, engine, shards, count).run()
    _finish(config, context, chat, meter)


def _records(config: dict[str, Any]) -> list[PromptRecord]:
    from train.data.prompts import read_prompt_dataset, read_prompt_file

    prompts = config["prompts"]
    if prompts["share"] == 0:
        return []
    if prompts["path"]:
        return read_prompt_file(Path(prompts["path"]), "generate.prompts.path")
    return read_prompt_dataset(prompts["dataset"], prompts["dataset_split"], prompts["column"], "generate.prompts")


def _recipe(config: dict[str, Any], context_length: int, seed: int) -> Recipe:
    from train.data.recipe import Recipe, SelfWritten

    same = (
        "num_tokens",
        "num_heldout",
        "heldout_greedy_share",
        "top_p",
        "max_tokens",
        "stop_loops",
        "num_turns",
        "shard_size",
    )
    return Recipe(
        **{key: config[key] for key in same},
        temperatures=tuple(config["temperatures"]),
        self_written=SelfWritten(
            **{**config["self_written"], "first_words": tuple(config["self_written"]["first_words"])}
        ),
        context_length=context_length,
        seed=seed,
    )


def _check_fit(config: dict[str, Any], recipe: Recipe, chat: ChatFormat) -> None:
    """Raises ValueError when the model cannot write prompts, or its context is too short for the budgets."""
    longest = config["max_tokens"]
    check_prompts(config["prompts"]["share"], lambda: chat.has_user_header)
    if config["prompts"]["share"] < 1:
        first_words = max((len(chat.token_ids(words)) for words in recipe.self_written.first_words), default=0)
        longest += len(chat.user_prefix_ids()) + first_words + config["self_written"]["max_tokens"]
    if longest > recipe.context_length:
        raise ValueError(
            f"generate.max_tokens={config['max_tokens']} with a prompt exceeds the target's context of"
            f" {recipe.context_length}; lower it, or generate.self_written.max_tokens"
        )


class _Meter:
    """Counts tokens and seconds of this run, and tells the tracker every few seconds."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._start = self._last = time.monotonic()
        self.num_tokens = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS:
            self._last = now
            rate = self.num_tokens / self.seconds
            self._context.tracker.log(self._context.stage, {"tokens_per_second": rate}, step=self.num_tokens)


def _finish(config: dict[str, Any], context: BuildContext, chat: ChatFormat, meter: _Meter) -> None:
    """`data.json`, `sample.txt` and the summary; times are in the summary alone."""
    from train.data.describe import describe, sample_text

    counts = describe(context.out)
    record = {"chat_template": chat.template.identity, "engine": config["engine"]["kind"], **counts}
    (context.out / "data.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sample = sample_text(context.out, chat)
    (context.out / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    seconds = meter.seconds
    rate = round(meter.num_tokens / seconds, 1) if meter.num_tokens else None
    context.summary.update(record, sample=sample, tokens_per_second=rate, generation_seconds=round(seconds, 1))
    splits = counts["splits"]
    context.summary["lines"] = [
        f"{split}: {splits[split].get('conversations', 0)} conversations,"
        f" {splits[split].get('written_tokens', 0)} tokens by the target"
        for split in splits
    ] + ([f"{meter.num_tokens} tokens in {seconds:.0f} s: {rate:.0f} tokens/s"] if rate else [])
    values = {f"{split} written tokens": splits[split].get("written_tokens", 0) for split in splits}
    context.tracker.summary(context.stage, {**values, "tokens_per_second": rate})
