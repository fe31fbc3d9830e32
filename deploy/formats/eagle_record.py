"""training.json beside a drafter: for which model and tokenizer it was trained, and how.

An EAGLE-3 head is useless beside any other model, and an intermediate model drafts badly for any other target; nothing
in their tensors would tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from deploy.formats.errors import FormatError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Owner:
    """What a drafter belongs to. All digests are sha256, hexadecimal.

    content: of the quantized model that it drafts for, as the artifact that it came from. model_files: name → digest of
    every file of its directory. tokenizer: of tokenizer.json. chat_template: identity (deploy.formats.chat) of the
    template under which the conversations were generated, masked and are served.
    """

    content: str
    model_files: Mapping[str, str]
    tokenizer: str
    chat_template: str

    def check(
        self,
        model_files: Mapping[str, str],
        tokenizer: str,
        chat_template: str,
        *,
        drafter: str = "head",
        above: str = "target",
    ) -> None:
        """Raises FormatError when model, tokenizer or template are others than those that it was trained with.

        drafter, above: what the two models are called in the message.
        """
        a_drafter, stage = ("a head", "eagle") if drafter == "head" else (f"an {drafter}", drafter)
        remedy = f"train {a_drafter} for this one (force={stage})"
        for name in sorted({*self.model_files, *model_files}):
            ours, theirs = self.model_files.get(name, "none"), model_files.get(name, "none")
            if ours != theirs:
                raise FormatError(
                    f"the {drafter} was trained on another {above}: {name} was {ours[:16]}, is {theirs[:16]}; {remedy}"
                )
        if tokenizer != self.tokenizer:
            raise FormatError(
                f"the {drafter} was trained with another tokenizer: tokenizer.json was {self.tokenizer[:16]}, is"
                f" {tokenizer[:16]}; {remedy}"
            )
        if chat_template != self.chat_template:
            raise FormatError(
                f"the {drafter} was trained with another chat template: it was {self.chat_template[:16]}, is"
                f" {chat_template[:16]}; {remedy}"
            )


@dataclass(frozen=True)
class Acceptance:
    """What held-out conversations gave, greedy. by_position: share of rounds in which the draft agreed that far, so
    falling; tau: tokens emitted per call of the target, 1 + the sum of them."""

    by_position: tuple[float, ...]
    tau: float


@dataclass(frozen=True)
class TrainingRecord:
    """How a drafter was trained and what it was worth.

    tokens: trained on, those of repeated epochs again. seconds: spent on them where time was the budget, otherwise
    None: what is written then depends on the settings and the data alone. served: acceptance with the weights as the
    runtime holds them (`served_form`); plain: with the weights as they were trained.
    cost_ratio: bytes of the drafter over bytes of the model above, both as the runtime reads them for a token; mbsu:
    τ / (cost_ratio·γ + 1) of `served` at γ drafted tokens. settings, data: JSON of the caller's choosing.
    """

    tokens: int
    seconds: float | None
    served: Acceptance
    served_form: str
    plain: Acceptance
    cost_ratio: float
    mbsu: float
    settings: Mapping[str, Any]
    data: Mapping[str, Any]


def record_json(owner: Owner, training: TrainingRecord) -> dict[str, Any]:
    """training.json's content."""
    return {
        "target": {"content": owner.content, "files": dict(owner.model_files)},
        "tokenizer": owner.tokenizer,
        "chat_template": owner.chat_template,
        "training": asdict(training),
    }


def parse_record(raw: Mapping[str, Any]) -> tuple[Owner, TrainingRecord]:
    """Inverse of `record_json`. Raises FormatError naming the key that is missing or not as expected."""
    target = raw.get("target")
    files = target.get("files") if isinstance(target, Mapping) else None
    if not isinstance(target, Mapping) or not isinstance(files, Mapping):
        raise FormatError("target.files is missing or not an object")
    digests = {"target.content": target.get("content"), **{f"target.files[{name!r}]": files[name] for name in files}}
    digests |= {key: raw.get(key) for key in ("tokenizer", "chat_template")}
    for key, value in digests.items():
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise FormatError(f"{key}={value!r} is not a sha256")
    owner = Owner(target["content"], dict(files), raw["tokenizer"], raw["chat_template"])
    return owner, _parse_training(raw.get("training"))


def _parse_training(raw: object) -> TrainingRecord:
    keys = set(TrainingRecord.__dataclass_fields__)
    if not isinstance(raw, Mapping) or set(raw) != keys:
        raise FormatError(f"training is not an object of {', '.join(sorted(keys))}")
    for key in ("tokens", "seconds", "cost_ratio", "mbsu"):
        if not (key == "seconds" and raw[key] is None):
            parse_number(f"training.{key}", raw[key])
    for key, kind in (("tokens", int), ("served_form", str), ("settings", dict), ("data", dict)):
        if not isinstance(raw[key], kind):
            raise FormatError(f"training.{key}={raw[key]!r} is not of type {kind.__name__}")
    acceptances = {key: parse_acceptance(f"training.{key}", raw[key]) for key in ("served", "plain")}
    return TrainingRecord(**{**raw, **acceptances})


def parse_acceptance(key: str, raw: object) -> Acceptance:
    """An Acceptance from JSON. Raises FormatError naming `key`."""
    if not isinstance(raw, Mapping) or set(raw) != {"by_position", "tau"} or not _is_number(raw["tau"]):
        raise FormatError(f"{key}={raw!r} is not {{'by_position': …, 'tau': …}}")
    shares = raw["by_position"]
    if not isinstance(shares, list | tuple) or not shares or not all(_is_number(s) and s <= 1 for s in shares):
        raise FormatError(f"{key}.by_position={shares!r} is not a list of shares")
    return Acceptance(tuple(shares), raw["tau"])


def parse_number(key: str, raw: object) -> float:
    """A finite number of 0 or more. Raises FormatError naming `key`."""
    if not _is_number(raw):
        raise FormatError(f"{key}={raw!r} is not a number of 0 or more")
    return raw


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
