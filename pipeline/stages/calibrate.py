"""calibrate: `samples.jsonl`, the calibration and held-out samples of every group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages import text_sources
from pipeline.stages.context_check import ReadShape, check_fits_context

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from compress.calibration.generate import SamplingRule
    from compress.calibration.samples import Sample
    from deploy.runtime.cpu_backend import CpuBackend

SAMPLES = "samples.jsonl"
FREE_TEXTS_SEED = 1
"""Added to the seed, so that free texts share no noise with conversations."""


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `calibrate` that decides what the samples are: no paths."""
    return {**config, "text": text_sources.keyed_documents(config["text"])}


def packages(config: dict[str, Any]) -> tuple[str, ...]:
    """Distributions whose version enters the stage's key; Python's own texts are those of the interpreter."""
    return ("tokenizers", "jinja2", "numpy", "python", *text_sources.packages(config["text"]["source"]))


def check(config: dict[str, Any]) -> None:
    """Raises ValueError on budgets that make no sense and on a text file that cannot be read.

    config: all of `calibrate`.
    """
    text, chat = config["text"], config["chat"]
    for group in ("chat", "free", "text"):
        for key, value in config[group].items():
            _check_value(f"calibrate.{group}.{key}", value)
    if config["sequence_length"] < 64:
        raise ValueError(f"calibrate.sequence_length={config['sequence_length']} is too short; use at least 64")
    if chat["num_heldout"] + text["num_heldout"] == 0:
        raise ValueError("calibrate.chat.num_heldout and calibrate.text.num_heldout are both 0; quality needs one")
    text_sources.check_documents(text, "calibrate.text")


def check_lengths(config: dict[str, Any], read_shape: ReadShape) -> None:
    """Raises ValueError when a sample would be longer than the target's context."""
    check_fits_context("calibrate.sequence_length", config["sequence_length"], read_shape)
    chat, free = config["chat"], config["free"]
    if chat["num_samples"] + chat["num_heldout"]:
        beside = chat["prompt_tokens"]
        check_fits_context("calibrate.chat.response_tokens", chat["response_tokens"], read_shape, beside=beside)
    if free["num_samples"]:
        check_fits_context("calibrate.free.num_tokens", free["num_tokens"], read_shape, beside=1)


def _check_value(key: str, value: Any) -> None:
    """Raises ValueError when a count, share, temperature or nucleus is out of its range."""
    name = key.rsplit(".", 1)[-1]
    if name.startswith("num_") and value < 0:
        raise ValueError(f"{key}={value} must be 0 or more")
    if name.endswith("_tokens") and value < 1:
        raise ValueError(f"{key}={value} must be 1 or more")
    if name.endswith("_share") and not 0 <= value < 1:
        raise ValueError(f"{key}={value} must be at least 0 and below 1")
    if name == "top_p" and not 0 < value <= 1:
        raise ValueError(f"{key}={value} must be above 0 and at most 1")
    if name == "temperature" and not 1e-3 <= value <= 100:
        raise ValueError(f"{key}={value} must be 0.001 … 100")


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    """Digests of the text file or of the data set's files, where these lie on this machine."""
    return text_sources.fingerprint(config["text"], config["text"]["source"], "calibrate.text")


def build(text: dict[str, Any], threads: int | None, context: BuildContext) -> None:
    """Writes `samples.jsonl`. text: the whole of `calibrate.text`."""
    from compress.calibration.samples import write_samples
    from deploy.formats.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(context.inputs["target"] / "model" / "tokenizer.json")
    samples = [*_texts(context, text, tokenizer), *_self_written(context, tokenizer, threads)]
    write_samples(context.out / SAMPLES, samples, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        entry = counts.setdefault(f"{sample.group} {sample.split}", {"samples": 0, "tokens": 0})
        entry["samples"] += 1
        entry["tokens"] += len(sample.ids)
    context.summary["samples"] = counts
    context.tracker.summary(context.stage, {f"{key} tokens": value["tokens"] for key, value in counts.items()})


def _texts(context: BuildContext, config: dict[str, Any], tokenizer: Tokenizer) -> list[Sample]:
    import numpy as np

    from compress.calibration import texts

    if config["source"] == "python":
        groups = texts.python_documents()
    elif config["source"] == "file":
        groups = {"text": texts.file_documents(Path(config["path"]))}
    else:
        groups = {"text": texts.dataset_documents(config["dataset"], config["dataset_split"], config["column"])}
    rng = np.random.default_rng(context.seed)
    samples = []
    for group, documents in groups.items():
        parts = texts.split_documents(documents, heldout_share=config["heldout_share"], seed=context.seed)
        for split, part in zip(("calibration", "heldout"), parts, strict=True):
            samples += texts.windows(
                part,
                lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                group=group,
                split=split,
                num_samples=config["num_samples" if split == "calibration" else "num_heldout"],
                sequence_length=context.config["sequence_length"],
                rng=rng,
            )
    return samples


def _self_written(context: BuildContext, tokenizer: Tokenizer, threads: int | None) -> list[Sample]:
    chat, free = context.config["chat"], context.config["free"]
    if chat["num_samples"] + chat["num_heldout"] + free["num_samples"] == 0:
        return []
    from deploy.formats.model_dir import ModelDirectory
    from deploy.runtime.cpu_backend import CpuBackend

    with ModelDirectory.open(context.inputs["target"] / "model") as files:
        end_ids, backend = frozenset(files.eos_token_ids), CpuBackend(files, threads=threads)
    return [*_conversations(context, backend, tokenizer, end_ids), *_free_texts(context, backend, tokenizer, end_ids)]


def _conversations(
    context: BuildContext, backend: CpuBackend, tokenizer: Tokenizer, end_ids: frozenset[int]
) -> list[Sample]:
    """Conversations; the first ones written are calibration, the rest held out."""
    from compress.calibration.conversations import ChatFrame, ConversationBudget, write_conversations
    from compress.calibration.samples import Sample
    from deploy.formats.chat import FIXED_DAY, ChatTemplate
    from pipeline.stages.text_writer import RuntimeWriter

    config = context.config["chat"]
    num_samples, num_heldout = config["num_samples"], config["num_heldout"]
    if num_samples + num_heldout == 0:
        return []
    rule = _rule(config, end_ids)
    lengths = ("prompt_tokens", "response_tokens", "system_share", "drop_share")
    budget = ConversationBudget(num_samples=num_samples + num_heldout, **{key: config[key] for key in lengths})
    template = ChatTemplate.from_directory(context.inputs["target"] / "model", day=FIXED_DAY)
    frame = ChatFrame.from_template(
        lambda messages: template.render(messages, add_generation_prompt=True),
        [tokenizer.decode([end], skip_special_tokens=False) for end in end_ids],
        template.bos_token or None,
    )
    with context.progress(budget.most_tokens, "conversations of the target with itself", "tokens") as bar:
        conversations = write_conversations(
            RuntimeWriter(backend, bar.update),
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            frame,
            rule,
            budget,
            seed=context.seed,
        )
    splits = ["calibration"] * num_samples + ["heldout"] * num_heldout
    return [
        Sample("chat", split, f"self-written/{index}", tuple(ids))
        for index, (split, ids) in enumerate(zip(splits, conversations, strict=True))
    ]


def _free_texts(
    context: BuildContext, backend: CpuBackend, tokenizer: Tokenizer, end_ids: frozenset[int]
) -> list[Sample]:
    from compress.calibration.generate import FreeTextBudget, write_free_texts
    from compress.calibration.samples import Sample
    from pipeline.stages.text_writer import RuntimeWriter

    config = context.config["free"]
    if config["num_samples"] == 0:
        return []
    budget = FreeTextBudget(**{key: config[key] for key in ("num_samples", "num_tokens", "drop_share")})
    with context.progress(budget.most_tokens, "texts that the target writes freely", "tokens") as bar:
        writer, rule = RuntimeWriter(backend, bar.update), _rule(config, end_ids)
        written = write_free_texts(writer, tokenizer.get_vocab(), rule, budget, seed=context.seed + FREE_TEXTS_SEED)
    return [Sample("free", "calibration", f"self-written/{index}", tuple(ids)) for index, ids in enumerate(written)]


def _rule(config: dict[str, Any], end_ids: frozenset[int]) -> SamplingRule:
    from compress.calibration.generate import SamplingRule

    return SamplingRule(config["temperature"], config["top_p"], end_ids)
