"""Kernels run on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

import os

import pytest
import torch

# Before any test module imports triton: what is decorated afterwards is interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
