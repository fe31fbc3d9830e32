"""What the interpreter cannot show: that kernels compile for an H100, to what, and within its registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


def compiled(module: str, cache: Path) -> list[list[str]]:
    """What a module of this directory prints: name, dot and spilled bytes of every launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", f"tests.deploy.kernels.gpu.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_linear_kernels_compile_to_hoppers_matrix_instructions_and_spill_nothing(tmp_path: Path) -> None:
    """One kind of dot in all buckets: another could add its products in another order."""
    launches = compiled("hopper", tmp_path)
    assert len(launches) == 22
    for name, dot, spilled in launches:
        assert dot == ("none" if name in ("reduce_partials", "quantize_rows") else "wgmma"), name
        assert spilled == "0", name


@pytest.mark.slow
def test_the_other_kernels_compile_and_spill_nothing(tmp_path: Path) -> None:
    """Attention's dots are of 16 rows in all buckets, too few for Hopper's own instruction."""
    launches = compiled("hopper_layers", tmp_path)
    assert len(launches) == 48
    for name, dot, spilled in launches:
        assert dot == ("mma" if name.startswith("_attention_kernel") else "none"), name
        assert spilled == "0", name
