"""CUDA graphs: a forward's hundreds of launches recorded once, and replayed as one.

A graph holds addresses. So one is captured for each row bucket and each set of outputs, over static inputs, at its
first use; and all are dropped when the cache grows, whose tensors are then other ones. Without CUDA everything is
computed as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Computed:
    """What a forward leaves on the device, a row each; of a graph, until its next replay.

    states: fp32 [rows, hidden], what enters the final norm. logits: fp32 [rows, head], None where no head was asked
    for. best: int32 [rows], the token of the largest logit; -1 where logits are not finite. taps: as of a Backend.
    """

    states: Tensor
    logits: Tensor | None
    best: Tensor | None
    taps: dict[int, Tensor]

    def part(self, count: int, head_rows: Sequence[int] | None = None) -> Computed:
        """Of the first `count` rows: those behind them are padding. head_rows: whose logits are wanted; None: all's."""
        taps = {layer: values[:count] for layer, values in self.taps.items()}
        if self.logits is None or self.best is None:
            return Computed(self.states[:count], None, None, taps)
        chosen = _index(range(count) if head_rows is None else head_rows, self.states.device)
        return Computed(self.states[:count], self.logits[chosen], self.best[chosen], taps)


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """A view where the rows follow each other, as they nearly always do."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64).to(device)


class Graphs:
    """One model's. Graphs share a memory pool: what one computed lasts until another runs."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Computed]] = {}
        self._generation = -1

    def run(self, key: Hashable, generation: int, compute: Callable[[], Computed]) -> Computed:
        """`compute()`, replayed where it was captured under `key` before.

        compute: reads static tensors alone, and writes none but the cache. generation: of those tensors; another one
        than before drops all graphs.
        """
        if not self._is_cuda:
            return compute()
        if generation != self._generation:
            self._captured, self._generation = {}, generation
        if key not in self._captured:
            self._captured[key] = self._capture(compute)
        graph, computed = self._captured[key]
        graph.replay()
        return computed

    def _capture(self, compute: Callable[[], Computed]) -> tuple[torch.cuda.CUDAGraph, Computed]:
        """Once beside the graph, so that kernels are compiled and loaded before the recording."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            computed = compute()
        return graph, computed
