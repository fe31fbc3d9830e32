import numpy as np
import pytest
import torch

from deploy.kernels.gpu.rope_cache import rope_cache, rope_cache_reference
from deploy.kernels.reference.attention import rotate
from deploy.kernels.reference.layers import rms_norm

CONTEXT, NUM_SLOTS, EPS = 40, 23, 1e-6
SHAPES = [(9, 3, 64), (12, 2, 128), (4, 4, 32), (6, 2, 16), (2, 1, 80)]


class Call:
    """Random arguments of one call, and caches full of noise."""

    def __init__(self, rows, shape, device, dtype=torch.float32, *, has_norm=False, q_dtype=torch.float32):
        heads, kv_heads, head_dim = shape
        generator = torch.Generator().manual_seed(rows * 100 + head_dim)

        def randn(*size):
            return torch.randn(*size, generator=generator).to(device)

        self.qkv = (3 * randn(rows, (heads + 2 * kv_heads) * head_dim)).to(dtype)
        angles = randn(CONTEXT, head_dim // 2)
        self.tables = (torch.cos(angles), torch.sin(angles))
        self.positions = torch.randint(0, CONTEXT, (rows,), generator=generator).to(device, torch.int32)
        self.slots = torch.randperm(NUM_SLOTS, generator=generator)[:rows].to(device, torch.int32)
        self.caches = tuple(randn(NUM_SLOTS, kv_heads, head_dim).to(torch.float16) for _ in range(2))
        self.norms = (randn(head_dim), randn(head_dim)) if has_norm else (None, None)
        self.q = torch.empty(rows, heads, head_dim, dtype=q_dtype, device=device)

    def run(self, op, rows=slice(None)):
        """q and both caches after computing `rows`."""
        q, caches = self.q[rows].clone(), [cache.clone() for cache in self.caches]
        args = (self.qkv[rows], *self.tables, self.positions[rows], self.slots[rows])
        op(*args, q, *caches, *self.norms, EPS)
        return q, *caches


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_equals_its_definition_bit_for_bit(device, shape, dtype):
    call = Call(5, shape, device, dtype)
    for ours, expected in zip(call.run(rope_cache), call.run(rope_cache_reference), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16])
def test_queries_are_rounded_to_the_type_that_is_asked_for(device, q_dtype):
    call = Call(3, SHAPES[0], device, q_dtype=q_dtype)
    assert torch.equal(call.run(rope_cache)[0], call.run(rope_cache_reference)[0])


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_with_norms_it_is_near_the_page_on_numerics(device, shape):
    heads, kv_heads, head_dim = shape
    call = Call(4, shape, device, has_norm=True)
    q, keys, values = (x.cpu().numpy() for x in call.run(rope_cache))
    x = call.qkv.cpu().numpy().reshape(4, -1, head_dim)
    cos, sin = (table[call.positions.long()].cpu().numpy() for table in call.tables)
    weights = [norm.cpu().numpy() for norm in call.norms]
    slots = call.slots.cpu().numpy()
    expected_q = rotate(rms_norm(x[:, :heads], weights[0], EPS), cos, sin)
    expected_k = rotate(rms_norm(x[:, heads : heads + kv_heads], weights[1], EPS), cos, sin)
    assert np.allclose(q, expected_q, rtol=1e-5, atol=2e-6)
    assert np.allclose(keys[slots], expected_k.astype(np.float16), rtol=1e-3, atol=1e-6)
    assert np.array_equal(values[slots], x[:, heads + kv_heads :].astype(np.float16))


def test_a_padding_row_writes_to_no_cache(device):
    call = Call(5, SHAPES[2], device)
    call.slots[1] = call.slots[4] = -1
    _, *written = call.run(rope_cache)
    _, *expected = call.run(rope_cache_reference)
    for ours, theirs, before in zip(written, expected, call.caches, strict=True):
        assert torch.equal(ours, theirs)
        changed = {int(slot) for slot in (ours != before).flatten(1).any(dim=1).nonzero()}
        assert changed == {int(slot) for slot in call.slots if slot >= 0}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's
def test_what_fp16_cannot_hold_becomes_infinite(device):
    call = Call(1, SHAPES[2], device)
    call.qkv[0, -1] = 1e6
    assert torch.isinf(call.run(rope_cache)[2][call.slots[0].long(), -1, -1])


def test_a_row_is_the_same_whatever_is_beside_it(device):
    call = Call(5, SHAPES[0], device, torch.float16, has_norm=True)
    q, keys, values = call.run(rope_cache)
    for row in range(5):
        alone = call.run(rope_cache, slice(row, row + 1))
        slot = call.slots[row].long()
        assert torch.equal(alone[0][0], q[row])
        assert torch.equal(alone[1][slot], keys[slot])
        assert torch.equal(alone[2][slot], values[slot])
