"""eagle: `head/`, an EAGLE-3 head that drafts for a quantized model, and `history.json`, how its training went.

The model, input `quantize`, is the target or the intermediate; the conversations are always the target's.

With a budget in tokens or epochs the artifact's bytes follow from its key; with a budget in seconds they depend on the
machine's speed, which the summary says (`is_reproducible`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.formats.architectures import ModelShape
from deploy.formats.digest import sha256_file
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.errors import FormatError
from deploy.formats.speculators import CONFIG_FILE, WEIGHTS_FILE, EagleDirectory
from pipeline.graph import BuildContext
from pipeline.stages.drafter_checks import check_vocabulary, check_worth
from pipeline.stages.training import check_training, keyed_settings, unkeyed_settings

HEAD = "head"
HISTORY = "history.json"
UNKEYED = ("min_acceptance",)
"""Settings that change nothing in the result, beside those of the training itself."""


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `eagle` that decides what is written, and so enters the digest.

    Not `initial`, which is a path: the head there enters by its files' digests (`fingerprint`).
    """
    kept = {key: value for key, value in config.items() if key not in (*UNKEYED, "initial")}
    return {**kept, "train": keyed_settings(config["train"])}


def unkeyed(config: dict[str, Any]) -> dict[str, Any]:
    """The training settings that do not."""
    return unkeyed_settings(config["train"])


def fingerprint(config: dict[str, Any], key: str) -> dict[str, str]:
    """Digests of the head that training starts from, where one is named."""
    if config["initial"] is None:
        return {}
    files = [Path(config["initial"]) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return {f"{key}.initial/{file.name}": sha256_file(file) for file in files if file.is_file()}


def feature_layers(config: dict[str, Any], num_layers: int, key: str = "eagle") -> tuple[int, ...]:
    """The layers whose input the head reads, ascending; `num_layers` stands for what enters the final norm.

    key: the configuration's name. Raises ValueError for a layer that a model of `num_layers` layers lacks.
    """
    layers = config["feature_layers"]
    if layers is None:
        chosen = {min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)}
    else:
        chosen = {layer if layer >= 0 else num_layers + 1 + layer for layer in layers}
        is_in_range = all(0 <= layer <= num_layers for layer in chosen)
        if not chosen or not is_in_range or len(chosen) < len(layers):
            raise ValueError(
                f"{key}.feature_layers={layers} must name different layers from 0 to {num_layers} (or -1, which is what"
                " enters the final norm); null takes EAGLE-3's"
            )
    return tuple(sorted(chosen))


def check(config: dict[str, Any], read_shape: Callable[[], ModelShape], key: str = "eagle") -> None:
    """Raises ValueError on what cannot be trained, or not for this model.

    config: all of `key`. read_shape: () → the ModelShape of the model that the head drafts for.
    """
    shape = read_shape()
    layers = feature_layers(config, shape.num_layers, key)
    if config["initial"] is not None:
        _check_initial(config, shape, layers, key)
    check_vocabulary(config["vocabulary"], shape.vocab_size, f"{key}.vocabulary")
    for name in ("unrolls", "num_drafted", "heldout_conversations", "compared_conversations"):
        if config[name] < 1:
            raise ValueError(f"{key}.{name}={config[name]} must be 1 or more")
    if config["step_decay"] <= 0:
        raise ValueError(f"{key}.step_decay={config['step_decay']} must be above 0; 0.8 and 1.0 are usual")
    check_worth(config, key)
    check_training(config["train"], f"{key}.train.")


def _check_initial(config: dict[str, Any], shape: ModelShape, layers: tuple[int, ...], key: str) -> None:
    """Raises ValueError when `initial` is no head that this training can go on with."""
    given = f"{key}.initial={config['initial']}"
    try:
        with EagleDirectory.open(Path(config["initial"]), shape) as head:
            found = head.config
    except FormatError as error:
        raise ValueError(f"{given}: {error}; name the directory of a head for this model, or leave it out") from error
    theirs = {"feature_layers": list(found.feature_layers), "norm_before_residual": found.norm_before_residual}
    ours = {"feature_layers": list(layers), "norm_before_residual": config["norm_before_residual"]}
    for name, value in theirs.items():
        if value != ours[name]:
            raise ValueError(f"{given} has {name}={value}, and {key}.{name} is {ours[name]}; set it to the head's")
    wanted = EagleConfig.for_target(
        shape,
        draft_vocab_size=found.draft_vocab_size,
        feature_layers=layers,
        norm_before_residual=found.norm_before_residual,
        num_drafted=found.num_drafted,
        embedding=found.embedding,
    ).layer
    for name, value in asdict(wanted).items():
        if name != "context_length" and getattr(found.layer, name) != getattr(wanted, name):
            raise ValueError(
                f"{given} has a layer of {name}={getattr(found.layer, name)}, and a head for this model has"
                f" {value}; leave it out"
            )


def check_place(config: dict[str, Any], key: str, published: Path) -> None:
    """Raises ValueError when the head that training starts from lies in the bundle that the run replaces: the same
    command would then never find its result, and train again each time."""
    initial = config["initial"]
    if initial is not None and Path(initial).absolute().is_relative_to(published.absolute()):
        raise ValueError(
            f"{key}.initial={initial} lies in {published}, which this run replaces; give the new bundle another name="
        )


def build(unkeyed_training: dict[str, Any], initial: str | None, threads: int | None, context: BuildContext) -> None:
    """Writes `head/` and `history.json`; continues from the checkpoints of an interrupted build."""
    from pipeline.stages.eagle_training import train_head

    train_head(unkeyed_training, None if initial is None else Path(initial), threads, context)
