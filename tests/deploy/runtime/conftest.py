"""Every instruction set that this machine has, and the GPU backend beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deploy.kernels.cpu.library import ISAS, supported_isas
from deploy.runtime.cpu_backend import CpuBackend


def _compute_with(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in supported_isas():
        pytest.skip(f"this machine does not have {isa}")
    monkeypatch.setenv("UNDERSTUDY_ISA", isa)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What native models made by the test compute with; those that this machine lacks are skipped by name."""
    _compute_with(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=[*ISAS, "gpu"])
def open_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Opens a model's directory as what is a Backend and a DraftModel, of each kind in turn. Named: `head_ids`.

    The GPU's has its operations in plain torch. torch is imported for it alone: the sanitized library is tested
    without.
    """
    if request.param == "gpu":
        from deploy.runtime.gpu_backend import GpuBackend
        from tests.deploy.runtime.gpu_devices import torch_device

        return lambda path, **choices: GpuBackend.open(path, torch_device(), **choices)
    _compute_with(request.param, monkeypatch)
    return lambda path, **choices: CpuBackend(path, threads=2, **choices)
