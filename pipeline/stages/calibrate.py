"""calibrate: `samples.jsonl`, the calibration and held-out samples of every group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages import text_sources

if TYPE_CHECKING:
    from compress.calibration.generate import SamplingRule

SAMPLES = "samples.jsonl"


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `calibrate` that decides what the samples are: no paths."""
    return {**config, "text": text_sources.keyed_documents(config["text"])}


def packages(config: dict[str, Any]) -> tuple[str, ...]:
    """Distributions whose version enters the stage's key; Python's own texts are those of the interpreter."""
    return ("torch", "transformers", "python", *text_sources.packages(config["text"]["source"]))


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
    if name == "temperature" and not 0 < value < math.inf:
        raise ValueError(f"{key}={value} must be above 0, and finite")


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    """Digests of the text file or of the data set's files, where these lie on this machine."""
    return text_sources.fingerprint(config["text"], config["text"]["source"], "calibrate.text")


def build(text: dict[str, Any], context: BuildContext) -> None:
    """Writes `samples.jsonl`. text: the whole of `calibrate.text`."""
    from transformers import AutoTokenizer

    from compress.calibration.samples import write_samples

    model_dir = context.inputs["target"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    samples = [*_texts(context, text, tokenizer), *_self_written(context, model_dir, tokenizer)]
    write_samples(context.out / SAMPLES, samples, lambda ids: str(tokenizer.decode(ids)))
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        entry = counts.setdefault(f"{sample.group} {sample.split}", {"samples": 0, "tokens": 0})
        entry["samples"] += 1
        entry["tokens"] += len(sample.ids)
    context.summary["samples"] = counts
    context.tracker.summary(context.stage, {f"{key} tokens": value["tokens"] for key, value in counts.items()})


def _texts(context: BuildContext, config: dict[str, Any], tokenizer: Any) -> list[Any]:
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
                lambda text: tokenizer(text, add_special_tokens=False).input_ids,
                group=group,
                split=split,
                num_samples=config["num_samples" if split == "calibration" else "num_heldout"],
                sequence_length=context.config["sequence_length"],
                rng=rng,
            )
    return samples


def _self_written(context: BuildContext, model_dir: Path, tokenizer: Any) -> list[Any]:
    chat, free = context.config["chat"], context.config["free"]
    if chat["num_samples"] + chat["num_heldout"] + free["num_samples"] == 0:
        return []
    from transformers import AutoModelForCausalLM

    from compress.calibration.generate import sampling_dtype
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(model_dir) as files:
        end_ids = frozenset(files.eos_token_ids)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=sampling_dtype()).eval()
    return [*_conversations(context, model, tokenizer, end_ids), *_free_texts(context, model, tokenizer, end_ids)]


def _conversations(context: BuildContext, model: Any, tokenizer: Any, end_ids: frozenset[int]) -> list[Any]:
    """Conversations; the first ones written are calibration, the rest held out."""
    from compress.calibration.conversations import ChatFrame, ConversationBudget, write_conversations
    from compress.calibration.samples import Sample
    from deploy.formats.chat import FIXED_DAY, ChatTemplate

    config = context.config["chat"]
    num_samples, num_heldout = config["num_samples"], config["num_heldout"]
    if num_samples + num_heldout == 0:
        return []
    rule = _rule(config, end_ids)
    lengths = ("prompt_tokens", "response_tokens", "system_share", "drop_share")
    template = ChatTemplate.from_directory(context.inputs["target"] / "model", day=FIXED_DAY)
    frame = ChatFrame.from_template(
        lambda messages: template.render(messages, add_generation_prompt=True),
        [tokenizer.decode([end]) for end in end_ids],
        tokenizer.bos_token,
    )
    steps = config["prompt_tokens"] + config["response_tokens"]
    with context.progress(steps, "conversations of the target with itself", "steps") as bar:
        conversations = write_conversations(
            model,
            lambda text: tokenizer(text, add_special_tokens=False).input_ids,
            frame,
            rule,
            ConversationBudget(num_samples=num_samples + num_heldout, **{key: config[key] for key in lengths}),
            seed=context.seed,
            on_step=bar.update,
        )
    splits = ["calibration"] * num_samples + ["heldout"] * num_heldout
    return [
        Sample("chat", split, f"self-written/{index}", tuple(ids))
        for index, (split, ids) in enumerate(zip(splits, conversations, strict=True))
    ]


def _free_texts(context: BuildContext, model: Any, tokenizer: Any, end_ids: frozenset[int]) -> list[Any]:
    from compress.calibration.generate import write_free_texts
    from compress.calibration.samples import Sample

    config = context.config["free"]
    if config["num_samples"] == 0:
        return []
    with context.progress(config["num_tokens"], "texts that the target writes freely", "steps") as bar:
        written = write_free_texts(
            model,
            tokenizer.get_vocab(),
            _rule(config, end_ids),
            num_samples=config["num_samples"],
            num_tokens=config["num_tokens"],
            drop_share=config["drop_share"],
            seed=context.seed,
            on_step=bar.update,
        )
    return [Sample("free", "calibration", f"self-written/{index}", tuple(ids)) for index, ids in enumerate(written)]


def _rule(config: dict[str, Any], end_ids: frozenset[int]) -> SamplingRule:
    from compress.calibration.generate import SamplingRule

    return SamplingRule(config["temperature"], config["top_p"], end_ids)
