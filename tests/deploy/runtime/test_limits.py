"""What a process says that may have no more memory or threads. In a file of its own: sanitizers need terabytes."""

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

LIMITED = """
import resource
from pathlib import Path

def limit(more_bytes):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, used + more_bytes))
"""


def limited(source, *arguments):
    """What a process prints whose memory `limit` bounds."""
    command = [sys.executable, "-c", LIMITED + source, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_more_threads_than_the_system_starts_are_refused_by_number():
    source = """
from deploy.kernels.cpu.library import Runtime
Runtime(1)
limit(1 << 30)
try:
    Runtime(1024)
except ValueError as error:
    print(error)
"""
    assert re.match(r"threads=1024: the system starts no more than \d+ threads here; use fewer", limited(source))


def test_memory_that_ends_is_a_memory_error_and_the_rest_goes_on(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    source = """
import sys
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
backend = CpuBackend(Path(sys.argv[1]), threads=1)
rows = lambda sequence: [Row(1 + i, i, sequence, i - 1) for i in range(100)]
first = backend.forward(rows(0)).logits
backend.keep(0, range(100))
limit(16 << 20)
try:
    for sequence in range(1, 100000):
        backend.forward(rows(sequence), logit_rows=[])
        backend.keep(sequence, range(100))
except MemoryError as error:
    print("no memory:", error)
for number in range(1, sequence + 1):
    backend.reset(number)
again = backend.forward(rows(1)).logits
print("same" if (again == first).all() else "other")
"""
    lines = limited(source, path).splitlines()
    assert lines[0].startswith("no memory: out of memory; answer fewer or shorter texts at once")
    assert lines[1] == "same"
