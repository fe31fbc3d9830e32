"""Every instruction set that this machine has."""

import pytest

from deploy.kernels.cpu.library import ISAS, supported_isas


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What native models made by the test compute with; those that this machine lacks are skipped by name."""
    if request.param not in supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("UNDERSTUDY_ISA", request.param)
    return str(request.param)
