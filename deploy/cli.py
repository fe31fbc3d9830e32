"""`python -m deploy generate | inspect | verify`: a bundle on the command line.

A mistake of the user's is one line on stderr and exit code 2; a bundle that fails verification is exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from deploy.formats.bundle import Bundle, Manifest, verify_bundle
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.session import Session

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Run and examine bundles.",
)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="the bundle's directory")]


def _stats_line(result: Generation) -> str:
    count = len(result.token_ids)
    decoded = count - 1  # the first one comes out of the prefill
    rate = f", {decoded / result.decode_seconds:.2f} tokens/s" if decoded else ""
    return (
        f"prompt {result.num_prompt_tokens} tokens in {result.prefill_seconds:.2f} s; "
        f"answer {count} tokens in {result.decode_seconds:.2f} s{rate}; ended by {result.finish_reason}"
    )


def _as_json(result: Generation) -> str:
    return json.dumps(
        {
            "text": result.text,
            "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.num_prompt_tokens,
            "completion_tokens": len(result.token_ids),
            "prefill_seconds": round(result.prefill_seconds, 4),
            "decode_seconds": round(result.decode_seconds, 4),
        },
        ensure_ascii=False,
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="what to say to the model")],
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="at most this many new tokens")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time")] = 0.0,
    top_p: Annotated[float, typer.Option(help="likeliest tokens that reach this probability; 1 is all")] = 1.0,
    top_k: Annotated[int, typer.Option(help="this many likeliest tokens; 0 is all")] = 0,
    min_p: Annotated[float, typer.Option(help="tokens at least this likely relative to the likeliest")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages tokens already in the text")] = 1.0,
    seed: Annotated[int, typer.Option(help="same seed, same text")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be repeated")] = None,
    activations: Annotated[Literal["int8", "bf16"], typer.Option(help="what linear layers compute with")] = "int8",
    stats: Annotated[bool, typer.Option("--stats", help="counts and times, on stderr")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of streamed text")] = False,
) -> None:
    """Let the bundle's target answer."""
    if raw and system is not None:
        raise ValueError("--system needs the chat template; leave out --raw or --system")
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    options = GenerationOptions(max_tokens, sampling, tuple(stop or ()))
    session = Session.open(Bundle.open(bundle), activations=activations)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    tokens = session.encode_raw(prompt) if raw else session.encode_chat(messages)
    result = session.generate(tokens, options, None if as_json else _write)
    _write(_as_json(result) + "\n" if as_json else "\n")
    if stats:
        typer.echo(_stats_line(result), err=True)


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _quality_table(manifest: Manifest) -> Table:
    """A row per method; measures of one kind of text ("prose/kl", …) share a column."""
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in manifest.quality for key in row):
        columns.setdefault(key.split("/")[0], []).append(key)
    measures = next(([key.split("/")[1] for key in keys] for keys in columns.values() if "/" in keys[0]), [])
    table = Table(title=f"Quality ({' / '.join(measures)})", title_justify="left")
    for column, keys in columns.items():
        is_text = any(isinstance(row.get(keys[0]), str) for row in manifest.quality)
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in manifest.quality:
        table.add_row(*(" / ".join(_format(row.get(key)) for key in keys) for keys in columns.values()))
    return table


def _settings(value: object) -> str:
    """A JSON value on one line: `method=gptq bits=4 …`, without what is not set."""
    if isinstance(value, dict):
        pairs = (
            (key, f"({_settings(item)})" if isinstance(item, dict) else _settings(item)) for key, item in value.items()
        )
        return " ".join(f"{key}={item}" for key, item in pairs if item not in ("", "()"))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else _format(value)


def _provenance_facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line a fact; of a stage only its configuration."""
    facts = []
    for key, value in provenance.items():
        if key == "stages" and isinstance(value, dict):
            facts += [(f"stage {name}", _settings(stage.get("config", {}))) for name, stage in value.items()]
        elif isinstance(value, dict):
            facts += [(f"{key}: {name}", _settings(item)) for name, item in value.items()]
        else:
            facts.append((key, _settings(value)))
    return [(name, text) for name, text in facts if text]


def _facts(title: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for key, value in facts:
        table.add_row(key, value)
    return table


@app.command()
def inspect(
    bundle: BundlePath,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as it is.")] = False,
) -> None:
    """Show what a bundle holds: models, precision, sizes, quality, licence, provenance."""
    manifest = Bundle.open(bundle).manifest
    if as_json:
        typer.echo((bundle / "manifest.json").read_text(encoding="utf-8"), nl=False)
        return
    total = sum(record.num_bytes for record in manifest.files.values())
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    facts = [("licence", manifest.licence), ("files", f"{len(manifest.files)}, {total / 1e6:.1f} MB")]
    facts.append(("extensions", ", ".join(manifest.extensions) or "none"))
    facts.append(("chat template", manifest.chat_template[:16]))
    console.print(_facts(manifest.name, facts))
    for item in manifest.components:
        rows: list[tuple[str, str]] = [
            ("architecture", item.architecture),
            ("precision", item.precision),
            ("parameters", f"{item.num_parameters / 1e6:.1f} M"),
            ("size", f"{item.num_bytes / 1e6:.1f} MB"),
            ("context", f"{item.context_length} tokens"),
        ]
        console.print(_facts(f"{item.role} ({item.path}/)", rows))
    if manifest.quality:
        console.print(_quality_table(manifest))
    if manifest.provenance:
        console.print(_facts("Provenance", _provenance_facts(manifest.provenance)))


@app.command()
def verify(bundle: BundlePath) -> None:
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


def _fail(message: object) -> int:
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    return 2


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        result: Any = app(arguments, standalone_mode=False)
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing at exit
            return 1
        return _fail(error)
    except typer.Abort:
        return 130
    except Exception as error:
        # typer's own usage errors; their class is not part of its interface, their method is.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())
    return result if isinstance(result, int) else 0


def main() -> None:
    sys.exit(run())
