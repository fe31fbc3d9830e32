"""The layout of 4-bit codes."""

import numpy as np
import pytest
import torch

from deploy.kernels.gpu.packing import pack_halves, unpack_halves


def test_a_block_holds_its_first_half_low_and_its_second_high() -> None:
    codes = np.arange(8, dtype=np.uint8)[None]
    assert pack_halves(codes, 4).tolist() == [[[0x20, 0x31]], [[0x64, 0x75]]]


def test_the_last_block_is_filled_up() -> None:
    assert pack_halves(np.full((1, 5), 3, dtype=np.uint8), 4, padding=8)[1].tolist() == [[0x83, 0x88]]


@pytest.mark.parametrize(("num_out", "num_in", "block"), [(17, 96, 32), (5, 576, 128), (3, 100, 64)])
def test_unpacking_gives_the_codes_back(num_out: int, num_in: int, block: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (num_out, num_in), dtype=np.uint8)
    assert torch.equal(unpack_halves(pack_halves(codes, block), num_in), torch.from_numpy(codes))
