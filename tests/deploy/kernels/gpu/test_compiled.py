"""What the interpreter cannot show: that kernels compile for a GPU, to what, and within its means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
WITHOUT_DOTS = ("reduce_partials", "quantize")
SHARED_LIMITS = {"90": 227 << 10, "89": 99 << 10}
"""Capability → bytes of shared memory that a program may have. 8.9 has the least from 8.0 on."""


def launches_of(module: str, capability: str, cache: Path) -> list[tuple[str, str]]:
    """Name and dot of every launch that a module of this directory compiles, all of which must fit the device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", f"tests.deploy.kernels.gpu.{module}", capability]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    launches = [line.split("\t") for line in done.stdout.splitlines()]
    for name, _, spilled, shared in launches:
        assert spilled == "0", name
        assert int(shared) <= SHARED_LIMITS[capability], name
    return [(name, dot) for name, dot, *_ in launches]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "instruction"), [("90", "wgmma"), ("89", "mma")])
def test_linear_kernels_fit_the_device_with_one_kind_of_dot_in_all_buckets(
    capability: str, instruction: str, tmp_path: Path
) -> None:
    """Another instruction could add its products in another order."""
    launches = launches_of("compile_linear", capability, tmp_path)
    assert len(launches) == 27
    for name, dot in launches:
        assert dot == ("none" if name.startswith(WITHOUT_DOTS) else instruction), name


@pytest.mark.slow
def test_the_other_kernels_fit_an_h100(tmp_path: Path) -> None:
    """Attention's dots are of 16 rows in all buckets, too few for Hopper's own instruction."""
    launches = launches_of("compile_layers", "90", tmp_path)
    assert len(launches) == 48
    for name, dot in launches:
        assert dot == ("mma" if name.startswith("_attention_kernel") else "none"), name
