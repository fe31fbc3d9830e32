"""The files of a bundle's models, from the artifacts that hold them: for export, and for whoever runs them before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from deploy.formats.components import used_extensions
from pipeline.stages.eagle import HEAD

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_ROLES = ("eagle-target", "eagle-intermediate")
INTERMEDIATE = "intermediate"
Place = Callable[[Path, Path], object]


def assemble(inputs: dict[str, Path], bundle: Path, place: Place = shutil.copyfile) -> dict[str, str]:
    """Puts tokenizer, target and drafters into `bundle`; role → path of every model.

    inputs: role → artifact, `target` and `quantize` and the drafters among them. place: puts a file where it belongs.
    """

    def put(source: Path, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        place(source, out)

    def put_directory(source: Path, role: str) -> None:
        components[role] = role
        for file in sorted(source.iterdir()):
            put(file, bundle / role / file.name)

    components: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        put(inputs["target"] / "model" / name, bundle / name)
    put_directory(inputs["quantize"] / "model", "target")
    if (inputs["quantize"] / "twin").is_dir():
        put_directory(inputs["quantize"] / "twin", "target-w4a16")
    if f"quantize-{INTERMEDIATE}" in inputs:
        put_directory(inputs[f"quantize-{INTERMEDIATE}"] / "model", INTERMEDIATE)
        put_directory(inputs[f"measure-{INTERMEDIATE}"] / "record", INTERMEDIATE)
    for role in HEAD_ROLES:
        if role in inputs:
            put_directory(inputs[role] / HEAD, role)
    return components


def extensions(inputs: dict[str, Path]) -> list[str]:
    """The extensions of the format that models among `inputs` use."""
    roles = [role for role in ("quantize", f"quantize-{INTERMEDIATE}") if role in inputs]
    return sorted(set().union(*(used_extensions(inputs[role], "model") for role in roles)))


def link_or_copy(source: Path, out: Path) -> None:
    """For files that nobody changes and that are needed for a while."""
    try:
        os.link(source, out)
    except OSError:
        shutil.copyfile(source, out)
