"""Attention of the training-time test against a loop over chains and heads."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from train.chains import Chains, find_chains
from train.eagle.attention import attend


def inputs(chains: Chains, num_tokens: int, num_own: int) -> list[Tensor]:
    """Queries, keys and values, then the chains' own keys and values, with gradients."""
    generator = torch.Generator().manual_seed(2)
    num_chains = len(chains.rows)
    sizes = [(num_chains, 6, 4), (num_tokens, 2, 4), (num_tokens, 2, 4)] + [(num_chains, 2, 4)] * (2 * num_own)
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def call(chains: Chains, *tensors: Tensor) -> Tensor:
    queries, keys, values, *own = tensors
    return attend(queries, keys, values, own[: len(own) // 2], own[len(own) // 2 :], chains)


@pytest.mark.parametrize("num_own", [0, 1, 3])
def test_a_chain_looks_at_its_conversation_up_to_its_first_token_and_at_its_own_later_steps(
    eagle: Any, num_own: int
) -> None:
    batch = eagle.batch(seed=1)
    chains = find_chains(batch, 4)
    queries, keys, values, *own = tensors = inputs(chains, len(batch.token_ids), num_own)
    found = call(chains, *tensors)
    for chain, row in enumerate(chains.rows.tolist()):
        begin = row - int(batch.position[row])
        for head in range(6):
            kv = head // 3
            seen = [*keys[begin : row + 1, kv], *(key[chain, kv] for key in own[:num_own])]
            read = [*values[begin : row + 1, kv], *(value[chain, kv] for value in own[num_own:])]
            shares = (torch.stack(seen) @ queries[chain, head]).softmax(0)
            torch.testing.assert_close(found[chain, head], shares @ torch.stack(read))


@pytest.mark.parametrize("num_own", [0, 2])
def test_gradients_are_those_of_finite_differences(eagle: Any, num_own: int) -> None:
    batch = eagle.pack(eagle.conversations(0, [[(3, 6)], [(2, 4)]], [6, 5]))
    chains = find_chains(batch, 3)
    assert gradcheck(lambda *tensors: call(chains, *tensors), inputs(chains, len(batch.token_ids), num_own))


def test_on_a_cpu_bfloat16_inputs_are_attended_in_float32(eagle: Any) -> None:
    batch = eagle.batch(seed=1)
    chains = find_chains(batch, 3)
    rounded = [tensor.detach().bfloat16() for tensor in inputs(chains, len(batch.token_ids), 2)]
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in rounded]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = call(chains, *tensors)
        found.square().sum().backward()
        results.append((found, [tensor.grad for tensor in tensors]))
    (expected, gradients), (found, rounded_gradients) = results
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(rounded_gradients, gradients, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs.bfloat16(), atol=1e-4, rtol=1e-2)


def test_without_chains_nothing_is_attended(eagle: Any) -> None:
    batch = eagle.pack(eagle.conversations(0, [[]], [6]))
    chains = find_chains(batch, 3)
    tensors = inputs(chains, 6, 1)
    call(chains, *tensors).sum().backward()
    assert not tensors[1].grad.any()
