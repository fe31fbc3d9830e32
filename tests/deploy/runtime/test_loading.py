"""How a model's files become a backend's, native or the GPU's: whole, in shards, and where a number is none."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors
from tests.deploy.runtime.rows import chain


def test_a_weight_that_is_not_finite_names_its_layer(open_model, tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), None)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0] + start
    data[begin : begin + 2] = b"\x80\x7f"  # infinity in bfloat16
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj.*not finite"):
        open_model(path)


def test_shards_load_like_one_file(open_model, tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    rows = chain([1, 2, 3])
    expected = open_model(path).forward(rows).logits
    with SafetensorsFile(path / "model.safetensors") as file:
        names = file.names()
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, chosen in parts.items():
            tensors = {n: BFloat16(file.array(n)) if file.dtype(n) == "BF16" else file.array(n) for n in chosen}
            write_safetensors(path / part, tensors)
    index = {"weight_map": {name: part for part, chosen in parts.items() for name in chosen}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(open_model(path).forward(rows).logits, expected)


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
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
