"""What the interpreter cannot show: that kernels compile for an H100, to what, and within its registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
def test_linear_kernels_compile_to_hoppers_matrix_instructions_and_spill_nothing(tmp_path: Path) -> None:
    """One kind of dot in all buckets: another could add its products in another order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.deploy.kernels.gpu.hopper"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    launches = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(launches) == 22
    for name, dot, spilled in launches:
        assert dot == ("none" if name in ("reduce_partials", "quantize_rows") else "wgmma"), name
        assert spilled == "0", name
