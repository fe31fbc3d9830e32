"""Every instruction set that this machine has; and Triton's interpreter where it has no GPU."""

import os

import pytest
import torch

from deploy.kernels.cpu.library import ISAS, supported_isas

# Before any test module imports triton: what is decorated afterwards is interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What native models made by the test compute with; those that this machine lacks are skipped by name."""
    if request.param not in supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("UNDERSTUDY_ISA", request.param)
    return str(request.param)
