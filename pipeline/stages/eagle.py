"""eagle: `head/`, an EAGLE-3 head that drafts for the quantized target, and `history.json`, how its training went.

With a budget in tokens or epochs the artifact's bytes follow from its key; with a budget in seconds they depend on the
machine's speed, which the summary says (`is_reproducible`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy.formats.architectures import ModelShape
from pipeline.graph import BuildContext

if TYPE_CHECKING:
    from train.loop.settings import TrainSettings

HEAD = "head"
HISTORY = "history.json"
UNKEYED = ("min_acceptance",)
UNKEYED_TRAINING = ("checkpoint_every_seconds", "feature_cache_gb", "prefetch")
"""Settings that change nothing in the result."""


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `eagle` that decides what is written, and so enters the digest."""
    training = {key: value for key, value in config["train"].items() if key not in UNKEYED_TRAINING}
    return {**{key: value for key, value in config.items() if key not in UNKEYED}, "train": training}


def unkeyed(config: dict[str, Any]) -> dict[str, Any]:
    """The training settings that do not."""
    return {key: config["train"][key] for key in UNKEYED_TRAINING}


def feature_layers(config: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers whose input the head reads, ascending; `num_layers` stands for what enters the final norm.

    Raises ValueError for a layer that a target of `num_layers` layers lacks.
    """
    layers = config["feature_layers"]
    if layers is None:
        chosen = {min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)}
    else:
        chosen = {layer if layer >= 0 else num_layers + 1 + layer for layer in layers}
        is_in_range = all(0 <= layer <= num_layers for layer in chosen)
        if not chosen or not is_in_range or len(chosen) < len(layers):
            raise ValueError(
                f"eagle.feature_layers={layers} must name different layers from 0 to {num_layers} (or -1, which is what"
                " enters the final norm); null takes EAGLE-3's"
            )
    return tuple(sorted(chosen))


def check(config: dict[str, Any], read_shape: Callable[[], ModelShape]) -> None:
    """Raises ValueError on what cannot be trained, or not for this target.

    config: all of `eagle`. read_shape: () → the target's ModelShape.
    """
    shape = read_shape()
    feature_layers(config, shape.num_layers)
    vocabulary = config["vocabulary"]
    for key, size in [("size", vocabulary["size"]), *(("trim", size) for size in vocabulary["trim"])]:
        if not 1 <= size <= shape.vocab_size:
            raise ValueError(
                f"eagle.vocabulary.{key}={size} must lie between 1 and the target's vocabulary of {shape.vocab_size}"
            )
    if any(size >= vocabulary["size"] for size in vocabulary["trim"]):
        raise ValueError(
            f"eagle.vocabulary.trim={vocabulary['trim']} must be below eagle.vocabulary.size={vocabulary['size']}; the"
            " head is trained with that many and trimmed afterwards"
        )
    for key in ("unrolls", "num_drafted", "heldout_conversations", "compared_conversations"):
        if config[key] < 1:
            raise ValueError(f"eagle.{key}={config[key]} must be 1 or more")
    if config["step_decay"] <= 0:
        raise ValueError(f"eagle.step_decay={config['step_decay']} must be above 0; 0.8 and 1.0 are usual")
    if not 0 <= config["min_acceptance"] < 1:
        raise ValueError(f"eagle.min_acceptance={config['min_acceptance']} must be at least 0 and below 1")
    train_settings(config["train"]).check("eagle.train.")


def check_heldout(generate: dict[str, Any]) -> None:
    """Raises ValueError when `generate` would hold out no greedy conversation, on which acceptance is measured."""
    if int(generate["num_heldout"] * generate["heldout_greedy_share"]) < 1:
        raise ValueError(
            f"generate.heldout_greedy_share={generate['heldout_greedy_share']} of generate.num_heldout="
            f"{generate['num_heldout']} is no conversation, and acceptance is measured on greedy ones; raise either"
        )


def train_settings(config: dict[str, Any]) -> TrainSettings:
    """`eagle.train` as the loop has it."""
    from train.loop.settings import TrainSettings

    return TrainSettings(**{**config, "betas": tuple(config["betas"])})


def build(unkeyed_training: dict[str, Any], threads: int | None, context: BuildContext) -> None:
    """Writes `head/` and `history.json`; continues from the checkpoints of an interrupted build."""
    from pipeline.stages.eagle_training import train_head

    train_head(unkeyed_training, threads, context)
