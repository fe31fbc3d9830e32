"""`deploy verify`: every byte and every shape."""

from __future__ import annotations

import typer

from deploy.commands import options as o
from deploy.formats.bundle import Bundle, verify_bundle
from deploy.formats.errors import BundleError
from deploy.runtime.session import open_tokenizer


def verify(bundle: o.BundlePath) -> None:
    """Check every byte and every shape; exit code 1 and one line a problem when something is wrong."""
    if not bundle.is_dir():
        raise ValueError(f"{bundle}: no such directory")
    problems = verify_bundle(bundle)
    if not problems:
        opened = Bundle.open(bundle)
        problems = _runtime_problems(opened)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        typer.echo(f"{bundle}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
        raise typer.Exit(1)
    manifest = opened.manifest
    total = sum(record.num_bytes for record in manifest.files.values())
    typer.echo(f"{bundle}: sound. {manifest.name}, {len(manifest.files)} files, {total / 1e6:.1f} MB, all as listed.")


def _runtime_problems(bundle: Bundle) -> list[str]:
    """What the runtime refuses although every file has its form: a tokenizer that does not load or fit the target."""
    try:
        open_tokenizer(bundle, bundle.model("target").shape.vocab_size)
    except BundleError as error:
        return [str(error)]
    return []
