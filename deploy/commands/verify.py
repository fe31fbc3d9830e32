"""`deploy verify`: every byte and every shape."""

from __future__ import annotations

import typer

from deploy.commands import options as o
from deploy.formats.bundle import Bundle, verify_bundle


def verify(bundle: o.BundlePath) -> None:
    """Check every byte and every shape; exit code 1 and one line a problem when something is wrong."""
    if not bundle.is_dir():
        raise ValueError(f"{bundle}: no such directory")
    problems = verify_bundle(bundle)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        typer.echo(f"{bundle}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
        raise typer.Exit(1)
    manifest = Bundle.open(bundle).manifest
    total = sum(record.num_bytes for record in manifest.files.values())
    typer.echo(f"{bundle}: sound. {manifest.name}, {len(manifest.files)} files, {total / 1e6:.1f} MB, all as listed.")
