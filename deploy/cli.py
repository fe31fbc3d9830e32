"""`python -m deploy`: the commands of deploy/commands/ on one command line.

A mistake of the user's is one line on stderr and exit code 2, and no command at all the help there; a bundle that fails
verification is exit code 1.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from deploy.commands.bench import bench
from deploy.commands.chat import chat
from deploy.commands.generate import generate
from deploy.commands.inspect import inspect
from deploy.commands.tune import tune
from deploy.commands.verify import verify

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run and examine bundles.",
)


@app.callback(invoke_without_command=True)
def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


for command in (generate, chat, bench, tune, inspect, verify):
    app.command()(command)


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
