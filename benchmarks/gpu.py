"""Everything about the GPU backend that only a GPU can tell, in one command of under eight minutes, without a network.

    python -m benchmarks.gpu [--parts tests,ceilings,linear,forward,hierarchy] [--json OUT] [--tiny]

The result goes to benchmarks/results/gpu_<device>.json unless --json says otherwise. The command fails where a part
does: a test, or a row whose result depends on the rows beside it.

--tiny runs all of it on the CPU, in Triton's interpreter, with tiny shapes: proof that the script works, on a machine
without a GPU. Its times say nothing, and it writes only where --json is given.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """A module with `measure(run, found) → result`: `found` has the results of the parts before it.

    seconds: after so many it leaves the rest of its measurements out.
    """

    name: str
    module: str
    seconds: int


PARTS = (
    Part("tests", "benchmarks.gpu_tests", 120),
    Part("ceilings", "benchmarks.gpu_ceilings", 15),
    Part("linear", "benchmarks.gpu_linear", 100),
    Part("forward", "benchmarks.gpu_forward", 90),
    Part("hierarchy", "benchmarks.gpu_hierarchy", 90),
)


def parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=names, help="of " + ",".join(names))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(names)):
        parser.error(f"--parts: {', '.join(unknown)} not known; use {', '.join(names)}")
    if {"linear", "forward"} & set(arguments.parts) and "ceilings" not in arguments.parts:
        parser.error("--parts: linear and forward are measured against the ceilings; add ceilings")
    return arguments


def run_parts(names: list[str], *, is_tiny: bool) -> dict[str, Any]:
    """Machine, and part → result, of the named parts in their order."""
    import torch

    from benchmarks.gpu_run import Run, describe_gpu

    run = Run(torch.device("cpu" if is_tiny else "cuda"), is_tiny)
    found: dict[str, Any] = {"machine": describe_gpu(run), "is_tiny": is_tiny, "seconds": {}}
    for part in PARTS:
        if part.name not in names:
            continue
        print(f"\n{part.name}", flush=True)
        begin = time.monotonic()
        run.deadline = begin + part.seconds
        found[part.name] = importlib.import_module(part.module).measure(run, found)
        found["seconds"][part.name] = round(time.monotonic() - begin, 1)
    return found


def result_path(found: dict[str, Any]) -> Path:
    """Where a GPU's result goes: "NVIDIA H100 80GB HBM3" → gpu_nvidia_h100_80gb_hbm3.json."""
    return RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', found['machine']['gpu']['name'].lower()).strip('_')}.json"


def main() -> None:
    arguments = parse()
    if arguments.tiny:
        # Before a kernel's module is imported, which settles whether it is interpreted.
        os.environ["TRITON_INTERPRET"] = "1"
        print("In Triton's interpreter: times say nothing about a GPU.")
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("benchmarks.gpu needs a CUDA device; --tiny proves the script in Triton's interpreter without one")
    found = run_parts(arguments.parts, is_tiny=arguments.tiny)
    path = arguments.json if arguments.json or arguments.tiny else result_path(found)
    write_json(path, found)
    print(f"\n{sum(found['seconds'].values()):.0f} s" + (f", written to {path}" if path else ""))
    failed = [part.name for part in PARTS if not found.get(part.name, {}).get("passed", True)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
