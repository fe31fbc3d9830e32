"""A runtime per instruction set; those that this machine lacks are skipped by name."""

import pytest

from deploy.kernels.cpu.library import ISAS, Runtime, supported_isas


@pytest.fixture(scope="session", params=ISAS)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if request.param not in supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    return Runtime(threads=2, isa=request.param)
