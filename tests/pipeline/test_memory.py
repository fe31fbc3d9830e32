"""Peak memory, and memory that is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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


def faults_of_temporary_blocks(before: str) -> int:
    """Pages that twenty blocks of 64 MiB, one after the other, make the system find; `before` runs first."""
    code = f"""
import ctypes, resource
from pipeline.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def block():
    address = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(address, 1, 64 << 20)
    libc.free(ctypes.c_void_p(address))
{before}
block()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert faults_of_temporary_blocks("") >= 20 * 16  # 64 MiB are 32 huge pages, or many more small ones
    assert faults_of_temporary_blocks("keep_freed_memory()") < 100
