"""Tokens of rows, chosen on the device: what the backend asks of deploy/kernels/gpu/sampling.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.runtime.gpu_ops import Ops
from deploy.runtime.sampling import SamplingParams

_GREEDY = SamplingParams()


@dataclass(frozen=True)
class Choice:
    """How a row's next token is chosen. position: of that token. path: the row's own; needed by a penalty alone."""

    sampling: SamplingParams
    sample_index: int
    position: int
    path: Sequence[int]


def greedy_rows(count: int, device: torch.device) -> SamplingRows:
    """So many rows that take the largest logit."""
    return SamplingRows.of([_GREEDY] * count, [0] * count, [0] * count, device)


def choose(ops: Ops, logits: Tensor, best: Tensor, choices: Sequence[Choice], head_ids: Tensor | None) -> list[int]:
    """The token of each row, -1 where its logits are not all finite; on the host, so all work is then done.

    logits: fp32 [rows, head]. best: int32 [rows], the tokens of greedy rows. head_ids: tokens of the columns.
    """
    if all(choice.sampling.temperature == 0 and choice.sampling.repetition_penalty == 1 for choice in choices):
        tokens: list[int] = best.tolist()
        return tokens
    device = logits.device
    rows = SamplingRows.of(
        [choice.sampling for choice in choices],
        [choice.sample_index for choice in choices],
        [choice.position for choice in choices],
        device,
    )
    lengths = [len(choice.path) for choice in choices]
    paths = torch.zeros((len(choices), max(lengths)), dtype=torch.int32)
    for row, choice in enumerate(choices):
        paths[row, : lengths[row]] = torch.tensor(choice.path, dtype=torch.int32)
    at = (paths.to(device), torch.tensor(lengths, dtype=torch.int32).to(device)) if rows.has_penalty else (None, None)
    tokens = ops.sample(logits.contiguous(), rows, *at, head_ids).tolist()
    return tokens


def part_of(rows: SamplingRows, begin: int, end: int) -> SamplingRows:
    """Some of the rows, without a copy."""
    part = slice(begin, end)
    return SamplingRows(rows.params[part], rows.sample_indices[part], rows.positions[part], rows.table[part])
