"""What the interpreter cannot show: that kernels compile for a GPU, to what, and within its means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
WITHOUT_DOTS = ("reduce_partials", "quantize_rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "instruction", "shared_limit"), [("90", "wgmma", 227 << 10), ("89", "mma", 99 << 10)]
)
def test_linear_kernels_fit_the_device_with_one_kind_of_dot_in_all_buckets(
    capability: str, instruction: str, shared_limit: int, tmp_path: Path
) -> None:
    """Another instruction could add its products in another order. 8.9 has the least shared memory from 8.0 on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.deploy.kernels.gpu.compile_linear", capability]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    launches = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(launches) == 22
    for name, dot, spilled, shared in launches:
        assert dot == ("none" if name in WITHOUT_DOTS else instruction), name
        assert spilled == "0", name
        assert int(shared) <= shared_limit, name
