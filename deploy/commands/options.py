"""Command line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.runtime.backends import BackendName
from deploy.runtime.devices import DeviceName
from deploy.runtime.modes import MODES

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="the bundle's directory")]
System = Annotated[str | None, typer.Option(help="the system message")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="at most this many new tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time")]
TopP = Annotated[float, typer.Option(help="likeliest tokens that reach this probability; 1 is all")]
TopK = Annotated[int, typer.Option(help="this many likeliest tokens; 0 is all")]
MinP = Annotated[float, typer.Option(help="tokens at least this likely relative to the likeliest")]
RepetitionPenalty = Annotated[float, typer.Option(help="above 1 discourages tokens already in the text")]
Seed = Annotated[int, typer.Option(help="same seed, same text")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be repeated")]
Stats = Annotated[bool, typer.Option("--stats", help="counts and times, on stderr")]
Device = Annotated[DeviceName, typer.Option(help="auto: the GPU where it can be used, else the CPU")]
Backend = Annotated[
    BackendName | None,
    typer.Option(help="instead of a device, e.g. a reference: they are slow and define the numbers"),
]
Threads = Annotated[int | None, typer.Option(help="default: what the process may use")]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help=f"who drafts: {', '.join(MODES)}; the text is the same with all. By default auto, with a reference plain",
    ),
]
Depth = Annotated[int | None, typer.Option(help="levels of a draft; of a lookup or a chain its tokens")]
Width = Annotated[int | None, typer.Option(help="nodes of a draft's level that are expanded; 1 drafts a chain")]
Nodes = Annotated[int | None, typer.Option(help="nodes of a draft at most")]
MinDraftLength = Annotated[
    int | None, typer.Option("--min-draft-length", help="cascades: tokens that the intermediate model writes at least")
]
