"""Stands in for `pipeline.stages.graph` in test_cli.py. What goes wrong is chosen by the variable DEMO_FAULT."""

from __future__ import annotations

import errno
import os
from typing import Any

import train
from pipeline.graph import BuildContext, Stage

FAULT = os.environ.get("DEMO_FAULT")


def build(context: BuildContext) -> None:
    if FAULT == "bug":
        raise KeyError("a bug")
    if FAULT == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if FAULT == "interrupt":
        raise KeyboardInterrupt
    (context.out / "out.txt").write_text("x")
    context.summary["lines"] = [f"train comes from {train.__file__}"]


def check(config: dict[str, Any]) -> None:
    if FAULT == "check":
        raise ValueError("target.size=0 is too small; use 1")


def build_graph(config: Any) -> list[Stage]:
    target = Stage("target", "target", 1, {"seed": config.seed}, build, check=check)
    return [target, Stage("export", "export", 1, {}, build, {"target": target})]
