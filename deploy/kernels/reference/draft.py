"""Drafting of docs/numerics.md: how a tree grows from what a model finds likely. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.kernels.reference.candidates import Candidates
from deploy.kernels.reference.fp32 import exp32
from deploy.runtime.tree import ROOT, Draft, TreeLimits

Expand = Callable[[Sequence[tuple[int, int]], int], list[Candidates]]
"""(rows, first) → candidates of each row from `first` on. A row is (token, parent): an earlier row; row 0 is the text's
last token, whose parent is ROOT."""


@dataclass
class _Node:
    token: int
    parent: int  # node, or ROOT
    level: int
    score: np.float32  # logarithm of the path's probability
    row: int = 0  # that computed it, where it was expanded

    @property
    def probability(self) -> float:
        return float(exp32(np.array([self.score]))[0])


def grow(limits: TreeLimits, last_token: int, expand: Expand) -> Draft:
    """What may follow `last_token`."""
    nodes: list[_Node] = []
    rows = [(last_token, ROOT)]
    expanded, kept, expected = [ROOT], list[int](), 0.0
    for level in range(1, limits.depth + 1):
        found = expand(rows, len(rows) - len(expanded))
        for parent, (tokens, scores) in zip(expanded, found, strict=True):
            for token, score in zip(tokens, scores, strict=True):
                node = _Node(token, parent, level, score if parent == ROOT else nodes[parent].score + score)
                if node.probability >= limits.min_probability:
                    nodes.append(node)
        ranked = sorted(range(len(nodes)), key=lambda i: (-nodes[i].score, i))
        kept = ranked[: limits.num_nodes]
        total = 0.0
        for index in kept:
            total += nodes[index].probability
        gain, expected = total - expected, total
        expanded = [index for index in ranked if nodes[index].level == level][: limits.width]
        if gain <= limits.min_gain or not expanded:
            break
        for index in expanded:
            node = nodes[index]
            node.row = len(rows)
            rows.append((node.token, 0 if node.parent == ROOT else nodes[node.parent].row))
    place = {index: i for i, index in enumerate(kept)} | {ROOT: ROOT}
    return Draft(
        tuple(nodes[index].token for index in kept),
        tuple(place[nodes[index].parent] for index in kept),
        tuple(float(nodes[index].score) for index in kept),
    )
