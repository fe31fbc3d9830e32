"""The form in which the runtime holds a head's weights."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16
from pipeline.stages.served_form import as_served, served_bytes


def test_values_are_within_half_a_step_of_bfloat16s_and_norms_are_exactly_those() -> None:
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((17, 96)).astype(np.float32), "norm.weight": np.float32([1.001, 3.3])}
    served = as_served(weights)
    stored = from_bfloat16(to_bfloat16(weights["fc.weight"]))
    groups = stored.reshape(17, 3, 32)
    steps = (groups.max(axis=2, keepdims=True) - groups.min(axis=2, keepdims=True)) / 15
    error = np.abs(served["fc.weight"] - stored).reshape(17, 3, 32)
    assert (error <= 0.51 * steps).all()  # a scale in fp16 adds up to 15 · 2^-12 of a step
    assert error.max() > 0.4 * steps.min()
    assert np.array_equal(served["norm.weight"], from_bfloat16(to_bfloat16(weights["norm.weight"])))


def test_bytes_count_a_scale_and_a_minimum_for_every_group() -> None:
    weights = {"fc.weight": np.zeros((10, 64), np.float32), "norm.weight": np.zeros(64, np.float32)}
    assert served_bytes(weights) == 10 * 32 + 10 * 2 * 4 + 64 * 4


def test_a_width_that_has_no_whole_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features=48 is not a multiple of 32"):
        as_served({"fc.weight": np.zeros((2, 48), np.float32)})
