"""Opens the bundles that it is told on stdin and lets each answer; one line of JSON for each on stdout.

A process of its own, so that a crash, a hang or a greedy allocation is an outcome and not the end of the tests.
"""

import json
import os
import resource
import sys
from pathlib import Path

from deploy.formats.bundle import Bundle
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

MOST_BYTES = 4 << 30
OPTIONS = GenerationOptions(2, SamplingParams(1.0, 20, 0.9, 0.01, 1.1))


def answer(path: str) -> str:
    session = Session.open(Bundle.open(path), threads=2)
    return session.generate(session.encode_chat([{"role": "user", "content": "Hi"}]), OPTIONS).finish_reason


def outcome(path: str) -> dict[str, str]:
    try:
        return {"kind": "answer", "text": answer(path)}
    except (ValueError, OSError) as error:
        return {"kind": "refusal", "text": str(error)}
    except BaseException as error:
        return {"kind": f"{type(error).__module__}.{type(error).__name__}", "text": str(error)}


def peak_mb() -> int:
    """Of this program alone: getrusage would count the process that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024


def main() -> None:
    if "ASAN_OPTIONS" not in os.environ:  # AddressSanitizer reserves terabytes
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin:
        result = outcome(line.rstrip("\n"))
        result["peak_mb"] = str(peak_mb())
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
