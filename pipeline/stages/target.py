"""target: a source becomes a plain model directory, `model/`, with `source.json` beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.target.sources import Source
from pipeline.graph import BuildContext

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""For models without a chat template: the messages' contents, joined."""
BEGINNING = "{{ bos_token }}"
"""In front of it where every text begins with that token: what a template renders is tokenized without adding any."""


def build(source: Source, context: BuildContext) -> None:
    """Writes `model/` (config.json, *.safetensors, tokenizer, chat template) and `source.json`."""
    from compress.target.boundaries import complete_end_tokens

    out = context.out / "model"
    facts = _from_gguf(source, out) if source.kind == "gguf" else _from_directory(source, out)
    if not (out / "chat_template.jinja").is_file():
        _write_plain_template(out)
        facts["chat_template"] = "none in the source; messages are joined as they are"
    added = complete_end_tokens(out)
    (context.out / "source.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    precision = facts["precision"]
    context.summary.update(facts, added_end_tokens=added)
    context.tracker.summary(context.stage, {key: precision[key] for key in ("bits_per_weight", "lossy")})


def _write_plain_template(out: Path) -> None:
    from compress.target.boundaries import begins_with_bos

    path = out / "chat_template.jinja"
    path.write_text(PLAIN_TEMPLATE, encoding="utf-8")
    if begins_with_bos(out):
        path.write_text(BEGINNING + PLAIN_TEMPLATE, encoding="utf-8")


def _from_gguf(source: Source, out: Path) -> dict[str, Any]:
    from compress.target.gguf_convert import convert
    from compress.target.inspect import open_gguf

    file = open_gguf(source.path)
    convert(file, out)
    return {
        "origin": source.origin,
        "revision": None,
        "licence": str(file.metadata.get("general.license", "unknown")),
        "precision": file.precision(),
    }


def _from_directory(source: Source, out: Path) -> dict[str, Any]:
    from compress.target.sources import check_directory, copy_directory, directory_precision

    check_directory(source.path)
    copy_directory(source.path, out)
    return {
        "origin": source.origin,
        "revision": source.revision,
        "licence": "unknown",
        "precision": directory_precision(source.path),
    }
