"""What every drafter that is trained here must be asked for, a head or an intermediate."""

from __future__ import annotations

from typing import Any


def check_vocabulary(config: dict[str, Any], vocab_size: int, key: str) -> None:
    """Raises ValueError on sizes of a draft vocabulary that a target of `vocab_size` tokens cannot have; null as its
    size is the target's own."""
    largest = vocab_size if config["size"] is None else config["size"]
    for name, size in [("size", largest), *(("trim", size) for size in config["trim"])]:
        if not 1 <= size <= vocab_size:
            raise ValueError(f"{key}.{name}={size} must lie between 1 and the target's vocabulary of {vocab_size}")
    if any(size >= largest for size in config["trim"]):
        raise ValueError(
            f"{key}.trim={config['trim']} must be below {key}.size={largest}; the drafter is trained with that many and"
            " trimmed afterwards"
        )


def check_worth(config: dict[str, Any], key: str) -> None:
    """Raises ValueError on a least acceptance that is no share."""
    if not 0 <= config["min_acceptance"] < 1:
        raise ValueError(f"{key}.min_acceptance={config['min_acceptance']} must be at least 0 and below 1")


def check_heldout(generate: dict[str, Any]) -> None:
    """Raises ValueError when `generate` would hold out no greedy conversation, on which acceptance is measured."""
    if int(generate["num_heldout"] * generate["heldout_greedy_share"]) < 1:
        raise ValueError(
            f"generate.heldout_greedy_share={generate['heldout_greedy_share']} of generate.num_heldout="
            f"{generate['num_heldout']} is no conversation, and acceptance is measured on greedy ones; raise either"
        )
