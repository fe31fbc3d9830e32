"""The random generators go on where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from train.loop.random_state import random_state, restore_random_state


def draw() -> list[float]:
    return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(torch.randn(1)), float(torch.rand(1))]


def test_every_generator_goes_on_from_a_state_that_went_through_json() -> None:
    # An odd number of normal draws: a second one of the pair is kept inside the generators.
    draw()
    state = json.loads(json.dumps(random_state()))
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restore_random_state(state)
    assert [draw() for _ in range(3)] == expected
