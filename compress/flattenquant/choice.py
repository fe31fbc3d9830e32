"""Where a site is flattened and with how many bits: error measures and the criterion, functions of tensors.

Measured is the output error of a site's worst layer (compress/row_errors.py) with weights and inputs of 4 bits and of
8, both with channels split at the same threshold and weights rounded to nearest. By the criterion `ratio` (the paper's,
arXiv 2402.17985) a site gets 4 bits where error_4 < γ · error_8; by the criterion `error` where error_4 < γ. Weights
count as well as inputs, since with few bits they are the larger part. Grids of 7 and of 127 steps make nearly every
ratio 18, and the smallest ratios belong to the sites that 8 bits serve worst, so the second criterion is there
(docs/methods.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.flattenquant.flatten import (
    PADDED_TO,
    capped_threshold,
    copy_counts,
    flatten_codes,
    flatten_index,
    flatten_threshold,
    padded_counts,
)
from compress.row_errors import relative_error

BITS = (4, 8)
Criterion = Literal["ratio", "error"]


@dataclass(frozen=True)
class FlattenRule:
    """How every site is decided.

    beta: of the threshold. max_expansion: C'/C that the threshold is raised to keep, before padding. criterion, gamma:
    which sites get 4 bits. group_size: input channels per weight scale; None for one per output channel.
    """

    beta: float
    max_expansion: float
    criterion: Criterion
    gamma: float
    group_size: int | None


@dataclass(frozen=True)
class Flattening:
    """What was decided for a site.

    index: int64 [C'], the channel of each column. threshold: T. errors: bits → relative error of the worst layer's
    output. bits: for weights and inputs.
    """

    index: Tensor
    threshold: float
    errors: Mapping[int, float]
    bits: int

    @property
    def scale(self) -> float:
        """Of the inputs: T / qmax."""
        return self.threshold / largest_code(self.bits)


def largest_code(bits: int) -> int:
    """7 or 127."""
    return int((1 << (bits - 1)) - 1)


def decide(channel_max: Tensor, x: Tensor, weights: Sequence[Tensor], rule: FlattenRule) -> Flattening:
    """The flattening of one site.

    channel_max: [C], max |x_j| over the calibration set; x: [rows, C], some of the set's inputs; weights: [out, C] of
    each layer that reads them.
    """
    threshold = flatten_threshold(channel_max, rule.beta)
    threshold = capped_threshold(channel_max, threshold, rule.max_expansion)
    multiple = max(PADDED_TO, rule.group_size or 0)
    counts = padded_counts(channel_max, copy_counts(channel_max, threshold), threshold, multiple)
    index = flatten_index(counts)
    errors = {bits: max(output_error(x, W, index, threshold, bits, rule.group_size) for W in weights) for bits in BITS}
    return Flattening(index, threshold, errors, choose_bits(errors, rule.criterion, rule.gamma))


def choose_bits(errors: Mapping[int, float], criterion: Criterion, gamma: float) -> int:
    """4 or 8. errors: bits → relative error of the site's worst layer."""
    limit = gamma * errors[8] if criterion == "ratio" else gamma
    return 4 if errors[4] < limit else 8


def output_error(x: Tensor, W: Tensor, index: Tensor, threshold: float, bits: int, group_size: int | None) -> float:
    """Relative error of x̂'·Ŵ'ᵀ against x·Wᵀ, with flattened inputs and weights rounded to `bits`.

    x: [rows, C]; W: [out, C].
    """
    scale = threshold / largest_code(bits)
    expanded = flatten_codes(torch.round(x / scale), index, largest_code(bits)) * scale
    return relative_error(x @ W.T, expanded @ round_weights(W[:, index], bits, group_size).T)


def round_weights(W: Tensor, bits: int, group_size: int | None) -> Tensor:
    """W [out, C'] rounded to nearest, symmetric, a scale per output channel or per group of `group_size` inputs."""
    grouped = W.unflatten(1, (-1, group_size or W.shape[1]))
    largest = largest_code(bits)
    scale = (grouped.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(W.dtype).tiny)
    return (torch.round(grouped / scale).clamp(-largest, largest) * scale).flatten(1)
