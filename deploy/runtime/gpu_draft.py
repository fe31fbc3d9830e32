"""Drafting of docs/numerics.md on the device: a tree grows level by level, and nothing waits for the host.

Every level has as many rows as a tree can have there at most. What the rules leave out (a token too unlikely, a level
behind the one that gained too little) is computed and marked; so the draft is the same. Where such rules can end a
draft early, the host looks after each level whether it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deploy.runtime.tree import ROOT, Draft, TreeLimits


@dataclass(frozen=True)
class Candidates:
    """The best tokens of each row: int64 [rows, k], -1 where there are fewer. scores: fp32 [rows, k], -inf there.

    A row without any had logits that are not finite.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Expansion:
    """Nodes to compute, a row each. level: theirs, from 1. tokens: int64 [rows]. parents: int64 [rows], rows of the
    level before."""

    level: int
    tokens: Tensor
    parents: Tensor


class NotFiniteError(ValueError):
    """Logits of a draft are not finite."""


@dataclass(frozen=True)
class _Rows:
    """Of the level that is expanded. nodes: int64, ROOT of the text's last token. is_there: bool."""

    nodes: Tensor
    scores: Tensor
    is_there: Tensor


@dataclass
class _Nodes:
    """All nodes so far, in order of creation."""

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    is_there: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def join(self, more: _Nodes) -> _Nodes:
        return _Nodes(
            torch.cat((self.tokens, more.tokens)),
            torch.cat((self.parents, more.parents)),
            torch.cat((self.scores, more.scores)),
            torch.cat((self.is_there, more.is_there)),
        )

    def best(self, count: int) -> Tensor:
        """Indices of the first `count` by rank; those that are not there last."""
        return torch.sort(self.ranked(), descending=True, stable=True).indices[:count]

    def ranked(self) -> Tensor:
        return torch.where(self.is_there, self.scores, -torch.inf)


def grow(limits: TreeLimits, first: Candidates, expand: Callable[[Expansion], Candidates]) -> Draft:
    """What may follow the text. first: candidates of its last token. Raises NotFiniteError."""
    device = first.scores.device
    rows = _Rows(
        torch.full((1,), ROOT, device=device), torch.zeros(1, device=device), torch.ones(1, dtype=torch.bool).to(device)
    )
    found, nodes = first, _none(device)
    is_going = is_finite = torch.ones((), dtype=torch.bool, device=device)
    expected = torch.zeros((), dtype=torch.float64, device=device)
    can_end_early = limits.min_gain > 0 or limits.min_probability > 0
    for level in range(1, limits.depth + 1):
        is_finite = is_finite & ((found.tokens[:, 0] >= 0) | ~rows.is_there).all()
        new, begin = _children(limits, rows, found, is_going), len(nodes)
        nodes = nodes.join(new)
        total = _expected(nodes, nodes.best(limits.num_nodes))
        is_going = is_going & (total - expected > limits.min_gain) & new.is_there.any()
        expected = total
        if level == limits.depth or (can_end_early and not bool(is_going)):
            break
        chosen = new.best(limits.width)
        rows = _Rows(chosen + begin, new.scores[chosen], new.is_there[chosen])
        per_row = found.tokens.shape[1]
        tokens = new.tokens[chosen].clamp(min=0)  # a node that is not there is computed, too
        found = expand(Expansion(level, tokens, torch.div(chosen, per_row, rounding_mode="floor")))
    return _read(nodes, nodes.best(limits.num_nodes), is_finite)


def _none(device: torch.device) -> _Nodes:
    ids = torch.empty(0, dtype=torch.int64, device=device)
    return _Nodes(ids, ids, torch.empty(0, device=device), torch.empty(0, dtype=torch.bool, device=device))


def _children(limits: TreeLimits, rows: _Rows, found: Candidates, is_going: Tensor) -> _Nodes:
    count = found.tokens.shape[1]
    scores = (rows.scores[:, None] + found.scores).flatten()
    is_there = (rows.is_there[:, None] & (found.tokens >= 0)).flatten() & is_going
    is_there &= torch.exp(scores) >= limits.min_probability
    return _Nodes(found.tokens.flatten(), rows.nodes.repeat_interleave(count), scores, is_there)


def _expected(nodes: _Nodes, kept: Tensor) -> Tensor:
    """Tokens that the drafter expects to be accepted of the kept nodes."""
    probabilities = torch.where(nodes.is_there, torch.exp(nodes.scores), 0.0)
    return probabilities[kept].to(torch.float64).sum()


def _read(nodes: _Nodes, kept: Tensor, is_finite: Tensor) -> Draft:
    """The one copy to the host."""
    bits = nodes.scores[kept].contiguous().view(torch.int32).to(torch.int64)
    columns = (kept, nodes.tokens[kept], nodes.parents[kept], bits, nodes.is_there[kept].to(torch.int64))
    packed = torch.cat((torch.stack(columns).flatten(), is_finite.to(torch.int64).reshape(1))).cpu()
    if not packed[-1]:
        raise NotFiniteError
    table = packed[:-1].view(len(columns), -1)
    table = table[:, table[4] == 1]
    indices, tokens, parents = table[:3].tolist()
    scores = table[3].to(torch.int32).view(torch.float32).tolist()
    place = {index: i for i, index in enumerate(indices)} | {ROOT: ROOT}
    return Draft(tuple(tokens), tuple(place[parent] for parent in parents), tuple(scores))
