"""`python -m pipeline` with the graph of demo_stages.py in place of the real one; run by test_cli.py."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

HEAVY = {"torch", "transformers", "llmcompressor", "datasets", "wandb", "matplotlib", "numpy"}


class DemoFinder:
    """Finds `pipeline.stages.graph` in demo_stages.py."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        if name != "pipeline.stages.graph":
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("demo_stages.py"))


if __name__ == "__main__":
    sys.path[0] = ""  # as `python -m` has it: the current directory first
    sys.meta_path.insert(0, DemoFinder)  # type: ignore[arg-type]
    try:
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    finally:
        print("HEAVY", sorted(HEAVY & sys.modules.keys()))
