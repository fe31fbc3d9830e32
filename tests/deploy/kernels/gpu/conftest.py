"""Kernels run on the GPU if there is one, else in Triton's interpreter on CPU tensors (tests/conftest.py)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def per_output(rng: np.random.Generator, num_out: int, num_in: int, bits: int) -> GroupedInt:
    """A weight with one symmetric scale per output."""
    q = rng.integers(0, 1 << bits, (num_out, num_in), dtype=np.uint8)
    scale = from_bfloat16(to_bfloat16(rng.uniform(0.01, 0.05, (num_out, 1)).astype(np.float32)))
    return GroupedInt.from_zero_point(q, scale, 1 << (bits - 1), bits=bits, group_size=num_in)


@pytest.fixture(scope="session")
def make_per_output() -> Callable[..., GroupedInt]:
    return per_output


@pytest.fixture(scope="session")
def same_bits(device: torch.device) -> Callable[..., list[int]]:
    """Of the given row counts those whose sums must have the same bits on this device.

    Interpreted, a dot is numpy's, whose library adds in another order for wider tiles; up to 16 rows share one.
    """
    return lambda *rows: [count for count in rows if count <= 16 or device.type == "cuda"]
