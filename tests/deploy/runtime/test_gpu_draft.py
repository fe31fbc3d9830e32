"""A tree grown on the device against the reference's, over a toy model whose candidates are a table."""

import numpy as np
import pytest
import torch

from deploy.kernels.reference.draft import grow as reference_grow
from deploy.runtime.gpu_draft import Candidates, NotFiniteError, grow
from deploy.runtime.tree import TreeLimits

LIMITS = [
    TreeLimits(depth=1, width=1, num_nodes=1),
    TreeLimits(depth=5, width=1, num_nodes=5),
    TreeLimits(depth=3, width=3, num_nodes=9),
    TreeLimits(depth=6, width=4, num_nodes=12, min_probability=0.02),
    TreeLimits(depth=9, width=2, num_nodes=40, min_gain=0.1),
    TreeLimits(depth=4, width=5, num_nodes=3, min_probability=0.2),
    TreeLimits(depth=7, width=3, num_nodes=64),
]


class Toy:
    """Candidates of a path depend on its tokens alone; some paths have fewer than `width`, and equal scores occur."""

    def __init__(self, seed, width):
        self.seed, self.width = seed, width

    def candidates(self, path):
        rng = np.random.default_rng([self.seed, *path])
        count = int(rng.integers(1, self.width + 1))
        steps = np.sort(rng.integers(1, 9, count)).astype(np.float32)
        return rng.permutation(50)[:count].tolist(), [np.float32(-0.25) * step for step in steps]

    def reference(self, limits):
        def expand(rows, first):
            paths = []
            for token, parent in rows:
                paths.append([*(paths[parent] if parent >= 0 else []), token])
            return [self.candidates(path) for path in paths[first:]]

        return reference_grow(limits, 7, expand)

    def device(self, limits, last_is_finite=True):
        paths = [[7]]

        def tensors(is_finite=True):
            tokens = np.full((len(paths), self.width), -1)
            scores = np.full(tokens.shape, -np.inf, np.float32)
            for row, path in enumerate(paths if is_finite else ()):
                found = self.candidates(path)
                tokens[row, : len(found[0])], scores[row, : len(found[0])] = found
            return Candidates(torch.tensor(tokens), torch.tensor(scores))

        def expand(expansion):
            nonlocal paths
            pairs = zip(expansion.tokens.tolist(), expansion.parents.tolist(), strict=True)
            paths = [[*paths[parent], token] for token, parent in pairs]
            return tensors(last_is_finite)

        return grow(limits, tensors(), expand)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_tree_is_the_references(limits):
    for seed in range(12):
        toy = Toy(seed, limits.width)
        found, expected = toy.device(limits), toy.reference(limits)
        assert (found.tokens, found.parents) == (expected.tokens, expected.parents)
        assert found.scores == expected.scores


def test_logits_that_are_not_finite_are_told_of_at_the_end():
    with pytest.raises(NotFiniteError):
        Toy(0, 3).device(LIMITS[2], last_is_finite=False)
