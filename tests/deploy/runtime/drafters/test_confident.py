"""The threshold follows what the head's probabilities come to."""

import math

import numpy as np
import pytest

from deploy.runtime.drafters.confident import ConfidentDrafter
from deploy.runtime.drafters.model import EagleDrafter
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits


class Head:
    """Drafts two tokens that it thinks likely at `probability`, and remembers the limits."""

    feature_layers = (0,)

    def __init__(self, probability):
        self.probability, self.limits, self.rows = probability, None, 0

    def draft(self, sequence, tokens, features, limits, sampling, sample_index=0):
        self.limits = limits
        self.rows += len(tokens)
        return Draft((1, 2), (-1, -1), (math.log(self.probability),) * 2)

    def length(self, sequence):
        return self.rows


def play(drafter, head, num_accepted, rounds, temperature=0.0):
    path = list(range(head.rows + 2))
    for _ in range(rounds):
        drafter.commit(0, path[-2 - num_accepted : -1], np.zeros((num_accepted + 1, 4), np.float32))
        drafter.propose(0, path, 5, SamplingParams(temperature), 0)
        path += [7] * (num_accepted + 1)
    return head.limits.min_probability


@pytest.fixture
def head():
    return Head(0.25)


@pytest.fixture
def drafter(head):
    return ConfidentDrafter(EagleDrafter(head, TreeLimits()), TreeLimits(6, 3, 8), worth=0.2)


def test_it_begins_by_believing_the_head(head, drafter):
    drafter.commit(0, [5], np.zeros((1, 4), np.float32))
    drafter.propose(0, [5, 6], 9, SamplingParams(), 0)
    assert head.limits == TreeLimits(6, 3, 8, min_probability=0.2)


def test_a_head_that_keeps_more_than_it_promises_drafts_more(head, drafter):
    assert play(drafter, head, 1, 200) == pytest.approx(0.2 / 2, rel=0.1)  # promises 0.5 a round, keeps 1


def test_one_that_keeps_less_drafts_less_at_that_temperature_alone(head, drafter):
    assert play(drafter, head, 0, 200, temperature=0.8) > 0.5
    drafter.commit(0, [7], np.zeros((1, 4), np.float32))
    drafter.propose(0, list(range(head.rows + 2)), 9, SamplingParams(), 0)
    assert head.limits.min_probability == pytest.approx(0.2)
