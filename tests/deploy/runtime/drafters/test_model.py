"""What reaches a drafting model: every token once, each with the state of the one before it."""

import numpy as np
import pytest

from deploy.runtime.drafters.model import EagleDrafter, LanguageModelDrafter, within
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import Draft, TreeLimits

GREEDY = SamplingParams()


class RecordingModel:
    """Keeps what it reads: (token, the state before it) per row. A token's state is the token itself, twice."""

    def __init__(self, feature_layers=()):
        self.feature_layers = feature_layers
        self.rows = {}

    def draft(self, sequence, tokens, features, limits, sampling, sample_index=0):
        assert (features is None) == (not self.feature_layers)
        states = [None] * len(tokens) if features is None else features[:, 0].astype(int).tolist()
        assert len(states) == len(tokens) > 0
        self.rows.setdefault(sequence, []).extend(zip(tokens, states, strict=True))
        return Draft.chain(list(range(limits.depth)))

    def length(self, sequence):
        return len(self.rows.get(sequence, ()))

    def truncate(self, sequence, length):
        assert length <= self.length(sequence)
        del self.rows[sequence][length:]

    def reset(self, sequence):
        self.rows.pop(sequence, None)


def states(tokens):
    return np.repeat(np.array(tokens, dtype=np.float32)[:, None], 2, axis=1)


def test_a_language_model_reads_the_text_whatever_became_of_its_drafts():
    model = RecordingModel()
    drafter = LanguageModelDrafter(model, TreeLimits(3, 1, 3))
    rng = np.random.default_rng(1)
    path = [5, 6, 7]
    for _ in range(50):
        drafter.propose(0, path, 9, GREEDY, 0)
        assert [token for token, _ in model.rows[0]] == path
        if rng.random() < 0.3:
            length = int(rng.integers(1, len(path)))
            assert drafter.begin(0, length) == length
            path = path[:length]
        path = path + [int(token) for token in rng.integers(0, 99, rng.integers(1, 5))]


@pytest.mark.parametrize("prompt", [3, 700])
def test_a_head_reads_every_token_with_the_state_of_the_one_before(prompt):
    model = RecordingModel((0, 1))
    drafter = EagleDrafter(model, TreeLimits(3, 1, 3))
    rng = np.random.default_rng(2)
    path = [int(token) for token in rng.integers(0, 99, prompt + 1)]
    computed = 0
    for _ in range(60):
        while computed < len(path) - 1:  # the model above computes in parts
            count = min(int(rng.integers(1, 300)), len(path) - 1 - computed)
            drafter.commit(0, path[computed : computed + count], states(path[computed : computed + count]))
            computed += count
        if rng.random() < 0.8:
            drafter.propose(0, path, 9, GREEDY, 0)
            assert model.rows[0] == list(zip(path[1:], path[:-1], strict=True))
        if rng.random() < 0.3:
            length = int(rng.integers(0, len(path)))
            computed = drafter.begin(0, length)
            assert length - 2 <= computed <= length
            path = path[: max(length, 1)]
        path = path + [int(token) for token in rng.integers(0, 99, rng.integers(1, 5))]


def test_states_of_a_long_prompt_do_not_pile_up():
    model = RecordingModel((0, 1))
    drafter = EagleDrafter(model, TreeLimits())
    tokens = list(range(1000))
    drafter.commit(0, tokens, states(tokens))
    assert model.length(0) >= 700
    assert drafter.begin(0, 1000) == 1000


def test_no_more_levels_are_drafted_than_the_budget():
    assert within(TreeLimits(4, 1, 4), 2) == TreeLimits(2, 1, 2)
    assert within(TreeLimits(4, 3, 8), 2) == TreeLimits(2, 3, 8)
    assert within(TreeLimits(4, 1, 4), 9) == TreeLimits(4, 1, 4)
