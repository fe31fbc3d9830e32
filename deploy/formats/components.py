"""What a bundle's manifest says about each of its models, found by opening (and so checking) the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.formats.chat import ChatTemplate
from deploy.formats.draft_vocabulary import VOCABULARY_FILE, read_draft_vocabulary
from deploy.formats.eagle_record import Acceptance, Owner, parse_acceptance, parse_number, parse_record
from deploy.formats.errors import BundleError, FormatError
from deploy.formats.model_dir import ModelDirectory, read_json
from deploy.formats.speculators import RECORD_FILE, EagleDirectory

# The target again, rounded to integer zero points, for programs that lack an extension which its own form uses.
TWIN = "target-w4a16"
# intermediate: a small language model that drafts for the target.
MODEL_ROLES = ("target", TWIN, "intermediate")
# EAGLE-3 heads, and the models that they draft for.
HEAD_ROLES = {"eagle-target": "target", "eagle-intermediate": "intermediate"}
DRAFTER_ROLES = ("intermediate", *HEAD_ROLES)
ROLES = (*MODEL_ROLES, *HEAD_ROLES)
# What lies beside an intermediate model, and is no part of it.
RECORD_FILES = (RECORD_FILE, VOCABULARY_FILE)


@dataclass(frozen=True)
class Drafter:
    """What a drafter is worth. acceptance: on held-out conversations, greedy, with the weights as the runtime holds
    them; target: content digest of the quantized model that it drafts for; feature_layers: whose states it reads, none
    for a language model; mbsu: see TrainingRecord."""

    target: str
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    acceptance: Acceptance
    mbsu: float


@dataclass(frozen=True)
class Component:
    """A model of the bundle. path: its directory, relative to the bundle. precision: e.g. "4-bit, groups of 32".

    num_bytes: of its files. drafter: for a role of `DRAFTER_ROLES`, otherwise None.
    """

    role: str
    path: str
    architecture: str
    precision: str
    num_parameters: int
    num_bytes: int
    context_length: int
    drafter: Drafter | None = None


def describe_precision(model: ModelDirectory) -> str:
    """One phrase: bits, group sizes and form of the linear layers, and the dtype of the embedding."""
    phrases = []
    for name in model.layers:
        group = model.group(name)
        if group is None:
            phrase = f"{model.dtype(f'{name}.weight')} linear layers"
        else:
            form = "symmetric" if group.symmetric else "float minima" if group.float_minimum else "zero points"
            scales = "a scale per output" if group.group_size is None else f"groups of {group.group_size}"
            phrase = f"{group.bits}-bit, {scales}, {form}"
            if group.activations is not None:
                phrase += f", inputs {group.activations.bits}-bit per {group.activations.scope}"
                phrase += ", flattened" if group.flatten else ""
        if phrase not in phrases:
            phrases.append(phrase)
    return "; ".join([*phrases, f"{model.dtype('model.embed_tokens.weight')} embedding"])


def describe_components(
    directory: Path, paths: Mapping[str, str], digests: Mapping[str, str]
) -> Iterable[Component | ValueError]:
    """Open every model and describe it; in its place, where one is not usable, the reason.

    paths: role → path relative to `directory`. digests: path relative to `directory` → sha256 of the file there.
    """
    for role, path in paths.items():
        try:
            if role in HEAD_ROLES:
                yield _describe_head(directory, role, path, _above(paths, role), digests)
            elif role == "intermediate":
                yield _describe_intermediate(directory, path, paths["target"], digests)
            else:
                yield _describe_model(directory, role, path)
        except ValueError as error:
            yield error
        except OSError as error:
            yield BundleError(f"{directory / path}: {error}")


def component_json(item: Component) -> dict[str, Any]:
    """The component as manifest.json holds it, under its role."""
    content = {
        "path": item.path,
        "architecture": item.architecture,
        "precision": item.precision,
        "parameters": item.num_parameters,
        "bytes": item.num_bytes,
        "context_length": item.context_length,
    }
    if item.drafter is None:
        return content
    return {**content, "drafter": asdict(item.drafter) | {"feature_layers": list(item.drafter.feature_layers)}}


def parse_component(role: str, raw: object) -> Component:
    """Inverse of `component_json`. Raises BundleError naming the role and the key that is not as documented."""
    if role not in ROLES:
        raise BundleError(f"component {role!r} is not known to this version; known: {', '.join(ROLES)}")
    if not isinstance(raw, Mapping):
        raise BundleError(f"component {role!r} is not an object")
    kinds = {"path": str, "architecture": str, "precision": str, "parameters": int, "bytes": int, "context_length": int}
    for key, kind in kinds.items():
        if not isinstance(raw.get(key), kind):
            raise BundleError(f"component {role!r} has no {key}")
    return Component(
        role=role,
        path=raw["path"],
        architecture=raw["architecture"],
        precision=raw["precision"],
        num_parameters=raw["parameters"],
        num_bytes=raw["bytes"],
        context_length=raw["context_length"],
        drafter=_parse_drafter(role, raw.get("drafter")) if role in DRAFTER_ROLES else None,
    )


def _parse_drafter(role: str, raw: object) -> Drafter:
    kinds: dict[str, type] = {"target": str, "draft_vocab_size": int, "feature_layers": list}
    if not isinstance(raw, Mapping):
        raise BundleError(f"component {role!r} has no drafter")
    for key, kind in kinds.items():
        if not isinstance(raw.get(key), kind):
            raise BundleError(f"component {role!r} has no drafter.{key}")
    try:
        acceptance = parse_acceptance("drafter.acceptance", raw.get("acceptance"))
        mbsu = parse_number("drafter.mbsu", raw.get("mbsu"))
    except FormatError as error:
        raise BundleError(f"component {role!r}: {error}") from error
    return Drafter(raw["target"], raw["draft_vocab_size"], tuple(raw["feature_layers"]), acceptance, mbsu)


def used_extensions(directory: Path, path: str) -> set[str]:
    """Which of the format's extensions the model at `directory / path` uses."""
    with ModelDirectory.open(directory / path) as model:
        groups = [group for name in model.layers if (group := model.group(name))]
    uses = {
        "weight_min": any(group.float_minimum for group in groups),
        "input_flatten": any(group.flatten for group in groups),
    }
    return {extension for extension, is_used in uses.items() if is_used}


def _describe_model(directory: Path, role: str, path: str) -> Component:
    with ModelDirectory.open(directory / path) as model:
        return Component(
            role=role,
            path=path,
            architecture=model.shape.model_type,
            precision=describe_precision(model),
            num_parameters=model.num_parameters(),
            num_bytes=_num_bytes(directory / path),
            context_length=model.shape.context_length,
        )


def _above(paths: Mapping[str, str], role: str) -> str:
    """Where the model lies that the head of `role` drafts for."""
    above = HEAD_ROLES[role]
    if above not in paths:
        raise BundleError(f"component {role!r} drafts for an {above}, and there is none; leave it out")
    return paths[above]


def _describe_intermediate(directory: Path, path: str, target_path: str, digests: Mapping[str, str]) -> Component:
    """Raises FormatError for one of another target, tokenizer or chat template, or too small for this one."""
    item = _describe_model(directory, "intermediate", path)
    with ModelDirectory.open(directory / target_path) as target, ModelDirectory.open(directory / path) as model:
        ours, theirs = model.shape, target.shape
    if ours.vocab_size != theirs.vocab_size:
        raise FormatError(f"{directory / path}: vocab_size is {ours.vocab_size}, the target's {theirs.vocab_size}")
    if ours.context_length < theirs.context_length:
        raise FormatError(f"{directory / path}: reads {ours.context_length} tokens, the target {theirs.context_length}")
    try:
        owner, training = parse_record(read_json(directory / path / RECORD_FILE))
    except FormatError as error:
        raise FormatError(f"{directory / path / RECORD_FILE}: {error}") from error
    _check_owner(directory, path, owner, target_path, digests, drafter="intermediate", above="target")
    ids = read_draft_vocabulary(directory / path, ours.vocab_size)
    drafter = Drafter(
        target=owner.content,
        draft_vocab_size=ours.vocab_size if ids is None else len(ids),
        feature_layers=(),
        acceptance=training.served,
        mbsu=training.mbsu,
    )
    return replace(item, drafter=drafter)


def _check_owner(
    directory: Path, path: str, owner: Owner, above_path: str, digests: Mapping[str, str], *, drafter: str, above: str
) -> None:
    """Raises BundleError for a drafter at `path` of another model, tokenizer or chat template."""
    prefix = f"{above_path}/"
    files = {name.removeprefix(prefix): digest for name, digest in digests.items() if name.startswith(prefix)}
    files = {name: digest for name, digest in files.items() if name not in RECORD_FILES}
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer, identity = digests.get("tokenizer.json", "none"), ChatTemplate(template).identity
    try:
        owner.check(files, tokenizer, identity, drafter=drafter, above=above)
    except ValueError as error:
        raise BundleError(f"{directory / path}: {error}") from error


def _describe_head(directory: Path, role: str, path: str, above_path: str, digests: Mapping[str, str]) -> Component:
    """Raises FormatError for a head of another model, tokenizer or chat template too."""
    with ModelDirectory.open(directory / above_path) as model:
        above = model.shape
    with EagleDirectory.open(directory / path, above) as head:
        _check_owner(directory, path, head.owner, above_path, digests, drafter="head", above=HEAD_ROLES[role])
        head.weights()
        config, training = head.config, head.training
        is_reference = config.embedding == "reference"
        embedding = f"the {HEAD_ROLES[role]}'s embedding" if is_reference else "its own copy of the embedding"
        return Component(
            role=role,
            path=path,
            architecture="eagle3",
            precision=f"BF16, {embedding}",
            num_parameters=head.num_parameters(),
            num_bytes=_num_bytes(directory / path),
            context_length=config.layer.context_length,
            drafter=Drafter(
                target=head.owner.content,
                draft_vocab_size=config.draft_vocab_size,
                feature_layers=config.feature_layers,
                acceptance=training.served,
                mbsu=training.mbsu,
            ),
        )


def _num_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
