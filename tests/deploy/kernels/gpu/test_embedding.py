import pytest
import torch

from deploy.kernels.gpu.embedding import embedding, embedding_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [(1, 96), (5, 1100), (3, 33)])
def test_it_looks_up_the_rows_exactly(device, dtype, rows, n):
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(263, n, generator=generator).to(device, dtype)
    tokens = torch.randint(0, 263, (rows,), generator=generator).to(device, torch.int32)
    ours = embedding(tokens, weight)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, embedding_reference(tokens, weight))
    assert torch.equal(ours, weight.float()[tokens.long()])


def test_the_first_and_the_last_row_and_64_bit_ids(device):
    weight = torch.arange(12, dtype=torch.float16, device=device).reshape(4, 3)
    assert embedding(torch.tensor([3, 0], device=device), weight).tolist() == [[9, 10, 11], [0, 1, 2]]
