"""intermediate: `model/`, a small language model of the target's tokenizer, and `history.json`, how it was trained.

With budgets in tokens or epochs the artifact's bytes follow from its key; with one in seconds they depend on the
machine's speed, which the summary says (`is_reproducible`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deploy.formats.architectures import ModelShape
from pipeline.graph import BuildContext
from pipeline.stages import text_sources
from pipeline.stages.drafter_checks import check_vocabulary, check_worth
from pipeline.stages.training import check_training, keyed_settings, unkeyed_settings
from train.intermediate.shapes import Sizes, choose_layers, layers_shape, random_shape

MODEL = "model"
HISTORY = "history.json"
VOCABULARY = "vocabulary.json"
RECORD = "record.json"
MEASURED = "record"
PHASES = ("pretrain", "align")
MEASURED_KEYS = ("num_drafted", "heldout_conversations")
GROUP, LANES = 32, 16


def keyed(config: dict[str, Any], heldout_share: float) -> dict[str, Any]:
    """The part of `intermediate` that decides what is trained: no paths, nothing of a phase that does not run.

    heldout_share: of texts, which calibrate keeps back.
    """
    initial = {key: value for key, value in config["initial"].items() if key not in ("path", "revision")}
    kept = {key: config[key] for key in ("phases", "trains_ends", *MEASURED_KEYS)}
    vocabulary = {key: config["vocabulary"][key] for key in ("size", "counts")}
    phases: dict[str, Any] = {}
    if "pretrain" in config["phases"]:
        text = {**text_sources.keyed_documents(config["pretrain"]["text"]), "heldout_share": heldout_share}
        phases["pretrain"] = {"text": text, "train": keyed_settings(config["pretrain"]["train"])}
    if "align" in config["phases"]:
        lora = config["align"]["lora"] if has_adapters(config) else None
        phases["align"] = {**config["align"], "lora": lora, "train": keyed_settings(config["align"]["train"])}
    return {"initial": initial, **kept, "vocabulary": vocabulary, **phases}


def keyed_measure(config: dict[str, Any]) -> dict[str, Any]:
    """The part that decides what is measured."""
    return {"trim": config["vocabulary"]["trim"], **{key: config[key] for key in MEASURED_KEYS}}


def unkeyed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that change nothing in the result, by phase, and where the texts are."""
    settings = {phase: unkeyed_settings(config[phase]["train"]) for phase in PHASES}
    return {**settings, "text": config["pretrain"]["text"]}


def needs_teacher(config: dict[str, Any]) -> bool:
    """Whether the quantized target's states are learned from, or its head is fitted to them."""
    return has_lens(config) or learns_distribution(config)


def learns_distribution(config: dict[str, Any]) -> bool:
    """Whether the target's distribution is learned, not its words alone."""
    return "align" in config["phases"] and config["align"]["loss"] == "distribution"


def has_lens(config: dict[str, Any]) -> bool:
    """Whether the head is fitted before anything is trained."""
    return config["initial"].get("lens_tokens") is not None


def has_adapters(config: dict[str, Any]) -> bool:
    """Whether adapters are trained in place of all weights."""
    return "align" in config["phases"] and config["align"]["lora"]["rank"] is not None


def sizes(initial: dict[str, Any]) -> Sizes:
    """`intermediate.initial` of kind random, as the trainer has it."""
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    return Sizes(
        **{name: initial[name] for name in names},
        ties_embeddings=initial["tied"],
        projects_embedding=initial["embedding"] == "projected",
    )


def planned_layers(initial: dict[str, Any], source: ModelShape) -> tuple[int, ...]:
    """Which of the source's layers the model starts from. Raises ValueError naming the key."""
    if initial["kind"] == "checkpoint":
        return tuple(range(source.num_layers))
    try:
        return choose_layers(source.num_layers, initial["layers"], initial["num_layers"])
    except ValueError as error:
        raise ValueError(f"intermediate.initial.{error}") from error


def planned_shape(config: dict[str, Any], target: ModelShape, source: ModelShape) -> ModelShape:
    """What the model will look like. source: of the model whose layers it takes. Raises ValueError naming the key."""
    initial = config["initial"]
    if initial["kind"] == "random":
        return random_shape(target, sizes(initial))
    return layers_shape(source, len(planned_layers(initial, source)), target.vocab_size, unties=has_lens(config))


def check(config: dict[str, Any], target: ModelShape, source: ModelShape) -> None:
    """Raises ValueError on what cannot be trained, or would not run.

    config: all of `intermediate`. target, source: shapes of the target, and of the model whose layers are taken.
    """
    _check_initial(config, target, source)
    check_vocabulary(config["vocabulary"], target.vocab_size, "intermediate.vocabulary")
    for key in MEASURED_KEYS:
        if config[key] < 1:
            raise ValueError(f"intermediate.{key}={config[key]} must be 1 or more")
    check_worth(config, "intermediate")
    phases = config["phases"]
    if phases != [phase for phase in PHASES if phase in phases]:
        raise ValueError(f"intermediate.phases={phases} must be {list(PHASES)} or a part of that, in this order")
    for phase in phases:
        check_training(config[phase]["train"], f"intermediate.{phase}.train.")
    if "pretrain" in phases:
        text_sources.check_documents(config["pretrain"]["text"], "intermediate.pretrain.text")
    lora = config["align"]["lora"]
    if has_adapters(config) and min(lora["rank"], lora["alpha"]) < 1:
        raise ValueError(f"intermediate.align.lora={lora}: rank and alpha must be 1 or more; 16 and 32 are usual")


def _check_initial(config: dict[str, Any], target: ModelShape, source: ModelShape) -> None:
    initial, phases = config["initial"], config["phases"]
    if initial["kind"] == "random":
        _check_sizes(initial)
        if not phases or (phases == ["align"] and has_adapters(config)):
            raise ValueError(
                f"intermediate.phases={phases}: a model that starts from noise must be trained, all of it; use"
                " [pretrain,align]"
            )
        if initial["embedding"] == "random" and not config["trains_ends"]:
            raise ValueError(
                "intermediate.trains_ends=false would leave the embedding noise; set it to true, or"
                " intermediate.initial.embedding=projected"
            )
    if has_lens(config) and initial["lens_tokens"] < 1:
        raise ValueError(
            f"intermediate.initial.lens_tokens={initial['lens_tokens']} must be 1 or more; 20000 is usual, and null"
            " leaves the head as it is"
        )
    shape = planned_shape(config, target, source)
    if shape.context_length < target.context_length:
        raise ValueError(
            f"intermediate.initial: the model reads {shape.context_length} tokens and the target"
            f" {target.context_length}; name a model whose context is as long"
        )
    _check_widths(shape)


def _check_sizes(initial: dict[str, Any]) -> None:
    """Raises ValueError for sizes of a random model that are none."""
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    for name in names:
        if initial[name] < 1:
            raise ValueError(f"intermediate.initial.{name}={initial[name]} must be 1 or more")
    if initial["num_heads"] % initial["num_kv_heads"]:
        raise ValueError(
            f"intermediate.initial.num_kv_heads={initial['num_kv_heads']} does not divide num_heads="
            f"{initial['num_heads']}; make it a divisor"
        )


def _check_widths(shape: ModelShape) -> None:
    """Raises ValueError for widths that the runtime does not support."""
    widths = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    widths["num_heads·head_dim"] = shape.num_heads * shape.head_dim
    for name, width in widths.items():
        if width % GROUP:
            raise ValueError(
                f"intermediate.initial: {name}={width} is no multiple of {GROUP}, which the runtime needs; use"
                f" {-(-width // GROUP) * GROUP}"
            )
    if shape.head_dim % LANES:
        raise ValueError(
            f"intermediate.initial: head_dim={shape.head_dim} is no multiple of {LANES}, which the runtime needs; use"
            f" {-(-shape.head_dim // LANES) * LANES}"
        )


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    """Digests of the texts to pre-train on, where they are read and lie on this machine."""
    text = config["pretrain"]["text"]
    source = text["source"] if "pretrain" in config["phases"] else "none"
    return text_sources.fingerprint(text, source, "intermediate.pretrain.text")


def text_packages(config: dict[str, Any]) -> tuple[str, ...]:
    """Distributions that read the texts to pre-train on, where any are."""
    return text_sources.packages(config["pretrain"]["text"]["source"]) if "pretrain" in config["phases"] else ()


def check_vocabularies(target: Callable[[], dict[str, int]], source: Callable[[], dict[str, int]]) -> None:
    """Raises ValueError when a token of the target has another id, or none, in the model that layers come from.

    target, source: () → token → id.
    """
    ours, theirs = target(), source()
    differing = [token for token, index in ours.items() if theirs.get(token) != index]
    if differing:
        token = differing[0]
        raise ValueError(
            f"intermediate.initial.path: the model has another tokenizer than the target ({len(differing)} of"
            f" {len(ours)} tokens differ; {token!r} is {ours[token]} and {theirs.get(token, 'missing')}); drafts are"
            " token ids, so name a model of the target's family"
        )


def build(unkeyed_settings: dict[str, Any], threads: int | None, context: BuildContext) -> None:
    """Writes `model/`, `history.json`, `vocabulary.json` and `record.json`; continues an interrupted build."""
    from pipeline.stages.intermediate_training import train_intermediate

    train_intermediate(unkeyed_settings, threads, context)


def build_measure(threads: int | None, context: BuildContext) -> None:
    """`record/`, what the quantized model is worth: `training.json`, and `draft_vocabulary.json` of a trimmed head."""
    from pipeline.stages.intermediate_measure import measure_intermediate

    measure_intermediate(threads, context)
