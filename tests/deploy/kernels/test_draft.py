"""How the reference's trees grow, on a toy model whose every path can be listed."""

import itertools

import numpy as np
import pytest

from deploy.kernels.reference.draft import grow
from deploy.runtime.tree import ROOT, Draft, TreeLimits

VOCABULARY = 4


class Toy:
    """Scores of each next token that depend on nothing but the path."""

    def __init__(self, seed, width, spread=1.0):
        self.seed, self.width, self.spread = seed, width, spread
        self.calls = []  # paths of each call

    def scores(self, path):
        logits = self.spread * np.random.default_rng([self.seed, *path]).standard_normal(VOCABULARY)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def expand(self, rows, first):
        paths = []
        for row in range(first, len(rows)):
            path = []
            while row != ROOT:
                path.insert(0, rows[row][0])
                row = rows[row][1]
            paths.append(tuple(path))
        self.calls.append(paths)
        return [self._candidates(path) for path in paths]

    def _candidates(self, path):
        scores = self.scores(path)
        best = np.argsort(-scores, kind="stable")[: self.width]
        return best.tolist(), [scores[i] for i in best]


def draft(seed=0, spread=1.0, last=9, **limits):
    toy = Toy(seed, limits.get("width", 1), spread)
    return toy, grow(TreeLimits(**limits), last, toy.expand)


def paths_of(found: Draft, last=9):
    paths = []
    for token, parent in zip(found.tokens, found.parents, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else (last,)), token))
    return paths


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_of_full_width_is_the_best_of_all_paths(seed):
    """16 · 4 nodes of a level are expanded at most, which are all of three levels."""
    toy, found = draft(seed, depth=3, width=16, num_nodes=20)
    exact = {}
    for depth in (1, 2, 3):
        for tokens in itertools.product(range(VOCABULARY), repeat=depth):
            total = np.float32(0)
            for i, token in enumerate(tokens):
                total = total + toy.scores((9, *tokens[:i]))[token]
            exact[(9, *tokens)] = float(total)
    best = sorted(exact, key=lambda path: -exact[path])[:20]
    assert sorted(paths_of(found)) == sorted(best)
    assert list(found.scores) == sorted(found.scores, reverse=True)
    for path, score in zip(paths_of(found), found.scores, strict=True):
        assert score == exact[path]


def test_width_one_is_the_likeliest_chain():
    toy, found = draft(depth=5, width=1, num_nodes=9)
    path = (9,)
    for _ in range(5):
        path = (*path, int(np.argmax(toy.scores(path))))
    assert found.tokens == path[1:]
    assert found.parents == (ROOT, 0, 1, 2, 3)
    assert [len(call) for call in toy.calls] == [1] * 5


def test_a_level_expands_its_likeliest_nodes_and_the_last_level_none():
    toy, _ = draft(1, depth=3, width=2, num_nodes=64)
    assert [len(call) for call in toy.calls] == [1, 2, 2]
    second = {(*path, token) for path in toy.calls[1] for token in toy._candidates(path)[0]}
    total = {path: sum(toy.scores(path[:i])[path[i]] for i in range(1, len(path))) for path in second}
    assert sorted(toy.calls[2]) == sorted(sorted(second, key=lambda path: -total[path])[:2])


def test_fewer_nodes_than_levels_end_a_chain():
    toy, found = draft(depth=6, width=1, num_nodes=2)
    assert len(found) == 2
    assert len(toy.calls) == 3  # the third level added nothing


def test_nodes_below_the_probability_are_neither_drafted_nor_expanded():
    _, whole = draft(2, depth=4, width=3, num_nodes=64)
    toy, found = draft(2, depth=4, width=3, num_nodes=64, min_probability=0.1)
    assert 0 < len(found) < len(whole)
    assert all(np.exp(score) >= 0.1 for score in found.scores)
    likely = {path for path, score in zip(paths_of(whole), whole.scores, strict=True) if np.exp(score) >= 0.1}
    assert set(paths_of(found)) == likely
    assert {path for call in toy.calls for path in call} - {(9,)} <= likely


def test_nothing_is_drafted_where_nothing_is_likely():
    toy, found = draft(spread=0.0, depth=4, width=3, num_nodes=64, min_probability=0.5)
    assert found == Draft()
    assert len(toy.calls) == 1


def test_growing_stops_where_a_level_gains_too_little():
    """Uniform: level d of width 1 is worth 4^-d."""
    for min_gain, levels in ((0.3, 1), (0.1, 2), (0.02, 3), (0.0, 5)):
        toy, found = draft(spread=0.0, depth=5, width=1, num_nodes=64, min_gain=min_gain)
        assert len(toy.calls) == levels
        assert len(found) == levels


def test_equal_nodes_rank_by_their_creation():
    _, found = draft(spread=0.0, depth=2, width=4, num_nodes=6)
    assert found.tokens == (0, 1, 2, 3, 0, 1)
    assert found.parents == (ROOT, ROOT, ROOT, ROOT, 0, 0)
