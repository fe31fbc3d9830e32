"""Errors by row: every token counts the same, whatever its size."""

from __future__ import annotations

import pytest
import torch

from compress.row_errors import relative_error, squared_row_errors


def test_a_row_counts_the_same_whatever_its_size() -> None:
    exact = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    approximate = exact * torch.linspace(1.0, 1.7, 8)[:, None]
    expected = torch.linspace(0.0, 0.7, 8).square()
    large = torch.tensor([1e4, *[1.0] * 7])[:, None]  # a first token's massive activations, which have no error here
    for scale in (torch.ones(8, 1), large):
        found = squared_row_errors(exact * scale, approximate * scale)
        torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=1e-4)
        assert relative_error(exact * scale, approximate * scale) == pytest.approx(
            float(expected.mean().sqrt()), rel=1e-4
        )


def test_a_row_of_zeros_has_no_error_and_leading_dimensions_are_rows() -> None:
    exact = torch.ones(2, 3, 4)
    exact[1, 2] = 0
    found = squared_row_errors(exact, 2 * exact)
    assert found.tolist() == [1, 1, 1, 1, 1, 0]
