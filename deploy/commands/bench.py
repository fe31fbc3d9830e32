"""`deploy bench`: tokens per second on a prompts file, in the form that docs/bundle-format.md describes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from deploy.commands import options as o
from deploy.formats.bundle import Bundle
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.machine import describe_machine
from deploy.runtime.measure import answer_all, summarize, time_rows
from deploy.runtime.prompts import read_prompts
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session


def bench(
    bundle: o.BundlePath,
    prompts: Annotated[Path, typer.Option(help='one {"prompt": …} or {"id", "category", "turns"} a line')],
    max_tokens: o.MaxTokens = 128,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many records")] = None,
    backend: o.Backend = "cpu",
    threads: o.Threads = None,
    out: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
) -> None:
    """Measure the bundle's target on prompts."""
    records = read_prompts(prompts)[:limit]
    if out is not None:  # found out before the work, not after it
        if out.is_dir():
            raise ValueError(f"--json {out}: is a directory; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)
    options = GenerationOptions(max_tokens, SamplingParams(temperature, seed=seed))
    session = Session.open(Bundle.open(bundle), backend=backend, threads=threads)
    result: dict[str, Any] = {
        "machine": describe_machine(getattr(session.backend, "runtime", None)),
        "bundle": bundle.name,
        "rows_ms": {"target": time_rows(session.backend)},
    }
    num_answers = sum(len(record.turns) for record in records)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("answers", total=num_answers)
        answers = answer_all(session, records, options, lambda: progress.advance(task))
    result["modes"] = {"plain": summarize(answers)}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _show(result)


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    times = ", ".join(f"{count}: {milliseconds:.2f}" for count, milliseconds in result["rows_ms"]["target"].items())
    console.print(f"milliseconds by rows: {times}")
    plain = result["modes"]["plain"]
    table = Table("category", "decode tok/s", "end-to-end tok/s", "first token ms", "tokens")
    for name, found in [*plain["by_category"].items(), ("all", plain)]:
        cells = (found[key] for key in ("decode_tok_s", "e2e_tok_s", "ttft_ms", "tokens"))
        table.add_row(name, *("" if cell is None else str(cell) for cell in cells))
    console.print(table)
    console.print(f"peak memory {plain['peak_rss_mb']} MB")
