"""A whole process of `python -m deploy generate`: time from its start to the first token, and its peak memory.

    python -m benchmarks.startup BUNDLE [--runs 7] [--context 2048] [--json OUT]

The first measurement asks for one token. The second gives a prompt that leaves room for a few tokens of a context of
2048 and fills it. Time to the first token runs from before the process is made to the first byte of its answer; peak
memory is what the system counted for it (getrusage), files that it maps included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.machine import fingerprint, write_json
from deploy.kernels.cpu.library import shared_runtime

_PROMPT = "Why is the sky blue?"
_NUM_NEW = 8  # tokens that the long answer decodes
_FIRST_TOKEN_S, _PEAK_MB = 1.0, 250.0


@dataclass(frozen=True)
class Run:
    """first_token: seconds until the first byte of the answer; whole: until the end; peak in units of 10^6 bytes."""

    first_token: float
    whole: float
    peak_mb: float


def measure(bundle: Path, arguments: list[str]) -> Run:
    """One process. Raises RuntimeError with its message when it fails."""
    command = [sys.executable, "-m", "deploy", "generate", str(bundle), *arguments]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    first_byte = process.stdout.read(1)
    first_token = time.perf_counter() - begin
    process.stdout.read()
    message = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first_byte:
        raise RuntimeError(f"{' '.join(command[:5])} … ended with {process.returncode}: {message}")
    return Run(first_token, time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e6)


def prompt_of(bundle: Path, num_tokens: int) -> str:
    """Python's own texts, cut to about `num_tokens` tokens and never more."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    text = "\n\n".join(topics[name] for name in sorted(topics))[: num_tokens * 8]
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens]
    while len(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids) > num_tokens:
        ids = ids[:-1]
    return str(tokenizer.decode(ids))


def summarize(runs: list[Run]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": round(statistics.median(values), 4), "min": round(min(values), 4)}

    return {
        "first_token_s": spread([run.first_token for run in runs]),
        "whole_s": spread([run.whole for run in runs]),
        "peak_mb": round(max(run.peak_mb for run in runs), 1),
        "runs": len(runs),
    }


def show(title: str, found: dict[str, Any]) -> None:
    first, whole = found["first_token_s"], found["whole_s"]
    print(
        f"{title}: first token after {first['median']:.3f} s (min {first['min']:.3f}), "
        f"end after {whole['median']:.3f} s, peak memory {found['peak_mb']:.0f} MB"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    long_prompt = prompt_of(arguments.bundle, arguments.context - _NUM_NEW)
    cases = {
        "one_token": ["-p", _PROMPT, "-n", "1", *threads],
        "full_context": ["--raw", "-p", long_prompt, "-n", str(_NUM_NEW), *threads],
    }
    measure(arguments.bundle, cases["one_token"])  # brings the files into memory
    result: dict[str, Any] = {
        "machine": fingerprint(shared_runtime(arguments.threads)),
        "bundle": arguments.bundle.name,
        "context": arguments.context,
        "targets": {"first_token_s": _FIRST_TOKEN_S, "peak_mb": _PEAK_MB},
    }
    for name, command in cases.items():
        result[name] = summarize([measure(arguments.bundle, command) for _ in range(arguments.runs)])
        show(name.replace("_", " "), result[name])
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
