"""How a site's channels are split: the rule of the paper, and what a split makes of inputs. Functions of tensors."""

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

Threshold = Literal["mean", "search"]


@dataclass(frozen=True)
class FlattenRule:
    """How every site is split, and on what grid its weights are.

    beta: of the threshold. threshold: β · mean for all, or searched. max_expansion: C'/C that no threshold may exceed,
    before padding. group_size: input channels per scale of the weights, None for one per output channel. observer:
    llmcompressor's, of their ranges.
    """

    beta: float
    threshold: Threshold
    max_expansion: float
    group_size: int | None
    symmetric: bool
    observer: str


@dataclass(frozen=True)
class Split:
    """How a site's channels are split. index: int64 [C'], the channel of each column. threshold: T."""

    index: Tensor
    threshold: float


def mean_split(channel_max: Tensor, rule: FlattenRule) -> Split:
    """By the paper's rule: no channel is cut off anywhere. T is raised to keep `max_expansion`.

    channel_max: [C], max |x_j| over the calibration set.
    """
    threshold = flatten_threshold(channel_max, rule.beta)
    threshold = capped_threshold(channel_max, threshold, rule.max_expansion)
    return padded_split(channel_max, copy_counts(channel_max, threshold), threshold, rule)


def padded_split(channel_max: Tensor, counts: Tensor, threshold: float, rule: FlattenRule) -> Split:
    """With so many copies [C] of each channel, and those that fill the columns up."""
    multiple = max(PADDED_TO, rule.group_size or 0)
    return Split(flatten_index(padded_counts(channel_max, counts, threshold, multiple)), threshold)


def quantized_copies(x: Tensor, split: Split, bits: int) -> Tensor:
    """x̂' [rows, C'] of x [rows, C]: the copies' codes times their scale."""
    scale = split.threshold / largest_code(bits)
    return flatten_codes(torch.round(x / scale), split.index, largest_code(bits)) * scale


def quantized_channels(x: Tensor, split: Split, bits: int) -> Tensor:
    """x̂ [rows, C]: what the copies of each channel of x [rows, C] hold together."""
    return torch.zeros_like(x).index_add_(1, split.index, quantized_copies(x, split, bits))


def largest_code(bits: int) -> int:
    """7 or 127."""
    return int((1 << (bits - 1)) - 1)
