"""Peak memory."""

from __future__ import annotations

import subprocess
import sys

from pipeline.memory import MemoryWatch

HUNDRED_MB = 100 * 1000 * 1000


def test_memory_of_this_process_counts() -> None:
    with MemoryWatch() as watch:
        before = watch.peak_bytes
        block = bytearray(HUNDRED_MB)
        block[::4096] = b"x" * len(block[::4096])
        watch._sample()
    assert watch.peak_bytes >= before + 0.9 * HUNDRED_MB


def test_memory_of_children_counts() -> None:
    code = f"x = bytearray({HUNDRED_MB}); x[::4096] = b'x' * len(x[::4096]); print(flush=True); input()"
    with MemoryWatch() as watch:
        before = watch.peak_bytes
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        watch._sample()
        child.communicate(b"\n")
    assert watch.peak_bytes >= before + 0.9 * HUNDRED_MB
