"""`deploy bench`: a bundle's modes on a prompts file, in the form that docs/bundle-format.md describes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from deploy.commands import options as o
from deploy.commands.bench_tables import show
from deploy.commands.opening import chosen_backend, is_fast
from deploy.formats.bundle import Bundle
from deploy.runtime.backends import BackendName
from deploy.runtime.benchmark import BenchRequest
from deploy.runtime.benchmark import bench as measure
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.modes import DrafterFactory, Mode, available_modes, require_possible
from deploy.runtime.prompts import read_prompts
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from deploy.runtime.synthetic import parse_rates


def bench(
    bundle: o.BundlePath,
    prompts: Annotated[Path, typer.Option(help='one {"prompt": …} or {"id", "category", "turns"} a line')],
    modes: Annotated[
        str | None,
        typer.Option(help="e.g. plain,lookup,eagle; by default all that the bundle can do, with a reference plain"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="passes over all prompts; times are their medians")] = 1,
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic-acceptance",
            help="also measure drafts that are right this often, e.g. 0.8,0.6,0.5 by position; never a mode's figure",
        ),
    ] = None,
    max_tokens: o.MaxTokens = 128,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many records")] = None,
    device: o.Device = "auto",
    backend: o.Backend = None,
    threads: o.Threads = None,
    out: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
) -> None:
    """Measure the bundle's modes on prompts; exit code 1 when one of them changed an answer."""
    records = read_prompts(prompts)[:limit]
    rates = parse_rates(synthetic) if synthetic is not None else ()
    if out is not None:  # found out before the work, not after it
        if out.is_dir():
            raise ValueError(f"--json {out}: is a directory; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise ValueError(f"--json {out}: may not be written; name another file")
    options = GenerationOptions(max_tokens, SamplingParams(temperature, seed=seed))
    opened = Bundle.open(bundle)
    computing = chosen_backend(device, backend, opened)
    chosen = _chosen_modes(modes, opened, computing)
    session = Session.open(opened, backend=computing, threads=threads)
    factory = DrafterFactory(opened, session.backend, computing, threads)
    request = BenchRequest(chosen, records, options, repeats, rates)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:

        def begin(num_answers: int) -> Callable[[], None]:
            task = progress.add_task("answers", total=num_answers)
            return lambda: progress.advance(task)

        result, _costs = measure(session, factory, request, begin)
    result = {"machine": result.pop("machine"), "bundle": bundle.name, **result}
    show(result)
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _require_identical(result)


def _chosen_modes(names: str | None, bundle: Bundle, backend: BackendName) -> tuple[Mode, ...]:
    """Raises ValueError as `require_possible`."""
    if names is None and not is_fast(backend):
        return ("plain",)
    if names is None or names == "all":
        return (*(mode for mode in available_modes(bundle) if mode != "auto"), "auto")
    return tuple(require_possible(name.strip(), bundle) for name in names.split(","))


def _require_identical(result: dict[str, Any]) -> None:
    for name, found in [*result["modes"].items(), *result.get("synthetic", {"modes": {}})["modes"].items()]:
        counted = found["identical_to_plain"]
        if counted["same"] != counted["total"]:
            wrong = counted["total"] - counted["same"]
            typer.echo(f"{name} changed {wrong} of {counted['total']} answers: this is a bug of the runtime", err=True)
            raise typer.Exit(1)
