"""A draft: tokens that may follow a text, as a tree. A sequence draft is a tree of width one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = -1
"""The parent of a draft's first tokens: the last token of the text."""


@dataclass(frozen=True)
class Draft:
    """Node i is tokens[i]; parents[i] is an earlier node, or ROOT.

    scores[i]: logarithm of the drafter's probability of the path down to node i; empty where it has none.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """Each token follows the one before it."""
        return cls(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """The node with `token` that follows `node` (or ROOT); None where there is none."""
        for index, (drafted, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent == node and drafted == token:
                return index
        return None


@dataclass(frozen=True)
class TreeLimits:
    """How a model's draft grows: level by level, the likeliest first, then the best of all candidates are kept.

    depth: levels at most; each costs a forward of the drafting model. width: nodes of a level that are expanded, and
    children considered of each; 1 drafts a chain. num_nodes: nodes of the finished draft at most. min_probability:
    a node whose path the drafter thinks less likely is neither drafted nor expanded. min_gain: growing stops when a
    level adds no more than this to the sum of the kept nodes' path probabilities, which is the number of tokens that
    the drafter expects to be accepted (OPT-Tree, arXiv 2406.17276; EAGLE-2, arXiv 2406.16858, has 0).

    Raises ValueError naming the value that is out of range.
    """

    depth: int = 4
    width: int = 1
    num_nodes: int = 4
    min_probability: float = 0.0
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        sizes = 1 <= self.depth <= MOST_NODES and 1 <= self.width <= MOST_WIDTH and 1 <= self.num_nodes <= MOST_NODES
        if sizes and 0 <= self.min_probability < 1 and self.min_gain >= 0:
            return  # limits are made for every draft; the table below only says which one is wrong
        limits = (
            ("depth", 1 <= self.depth <= MOST_NODES, f"1 … {MOST_NODES}"),
            ("width", 1 <= self.width <= MOST_WIDTH, f"1 … {MOST_WIDTH}"),
            ("num_nodes", 1 <= self.num_nodes <= MOST_NODES, f"1 … {MOST_NODES}"),
            ("min_probability", 0 <= self.min_probability < 1, "at least 0 and below 1"),
            ("min_gain", self.min_gain >= 0, "0 or more"),
        )
        for name, is_valid, allowed in limits:
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; use {allowed}")


MOST_NODES, MOST_WIDTH = 64, 16
