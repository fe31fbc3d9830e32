"""`deploy chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import sys

import typer

from deploy.commands import options as o
from deploy.commands.opening import draft_options, open_session
from deploy.commands.terminal import speculation_line, stats_line, write
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.modes import Mode
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import ContextError, Session

PROMPT = "> "


def chat(
    bundle: o.BundlePath,
    system: o.System = None,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = 0,
    mode: o.Mode = None,
    depth: o.Depth = None,
    width: o.Width = None,
    nodes: o.Nodes = None,
    min_draft_length: o.MinDraftLength = None,
    device: o.Device = "auto",
    backend: o.Backend = None,
    threads: o.Threads = None,
    stats: o.Stats = False,
) -> None:
    """Talk with the bundle's target. A line is a turn; /new starts over, /quit or the end of input leaves."""
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    options = GenerationOptions(max_tokens, sampling)
    drafts = draft_options(depth, width, nodes, min_draft_length)
    session, decoding = open_session(bundle, mode, drafts, device, backend, threads)
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is one turn's error
    while (line := _read_line()) not in (None, "/quit"):
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            result = _answer(session, messages, options)
            if stats and result is not None:
                _show_stats(decoding, result)


def _answer(session: Session, messages: list[dict[str, str]], options: GenerationOptions) -> Generation | None:
    """Answers the last message and appends the answer; a turn that does not fit the context is taken back."""
    try:
        result = session.generate(session.encode_chat(messages), options, write)
    except ValueError as error:
        messages.pop()
        remedy = ", or start over with /new" if isinstance(error, ContextError) else ""
        typer.echo(f"error: {error}{remedy}", err=True)
        return None
    write("\n")
    messages.append({"role": "assistant", "content": result.text})
    return result


def _show_stats(mode: Mode, result: Generation) -> None:
    typer.echo(stats_line(result), err=True)
    typer.echo(speculation_line(mode, result), err=True)


def _read_line() -> str | None:
    """The next line without surrounding blanks; None at the end of input. The prompt appears only on a terminal."""
    if sys.stdin.isatty():
        write(PROMPT)
    line = sys.stdin.readline()
    return line.strip() if line else None
