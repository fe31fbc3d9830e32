"""What is kept of a site's inputs while the samples pass."""

from __future__ import annotations

import pytest
import torch

from compress.flattenquant.watcher import _Inputs


@pytest.mark.parametrize("num_samples", [1, 2, 5, 16])
def test_halves_share_no_sample_and_have_the_largest_values_of_their_own(num_samples: int) -> None:
    inputs = _Inputs()
    for number in range(num_samples):
        sample = torch.zeros(9, num_samples)
        sample[:, number] = torch.arange(9.0) + 1  # of a sample's own channel; its largest is in its last row
        inputs.add(sample, num_rows=4)
    halves = inputs.halves()
    assert len(halves) == min(num_samples, 2)
    seen = torch.stack([half.channel_max for half in halves])
    assert torch.equal(seen.sum(0), torch.full((num_samples,), 9.0))
    assert torch.equal(seen.amax(0), seen.sum(0))
    for half in halves:
        assert len(half.rows) == 4 * int((half.channel_max > 0).sum())
        assert torch.equal(half.rows.amax(0) > 0, half.channel_max > 0)
    if num_samples == 16:
        assert int((seen[0] > 0).sum()) == 8
        assert not torch.equal(seen[0] > 0, torch.arange(16) % 2 == 0)  # kinds of text come in turn


def test_first_tokens_count_in_the_largest_values_and_are_no_row() -> None:
    inputs = _Inputs()
    inputs.add(torch.tensor([[50.0], [1.0], [2.0], [3.0]]), num_rows=8)
    (seen,) = inputs.halves()
    assert seen.channel_max.tolist() == [50.0]
    assert seen.rows.flatten().tolist() == [1.0, 2.0, 3.0]
    inputs.add(torch.tensor([[7.0]]), num_rows=8)
    assert sorted(row for half in inputs.halves() for row in half.rows.flatten().tolist()) == [1.0, 2.0, 3.0, 7.0]
