"""How a site is split with either number of bits, and what that loses: functions of tensors.

Measured is the output error of a site's worst layer (compress/row_errors.py) with weights and inputs of 4 bits and of
8, the bias included and the weights rounded to nearest on the grid that is written; GPTQ, which comes later, is left
out. Weights count as well as inputs. Which sites then get 4 bits is decided for all together (`bits`).

The threshold is the paper's, β · mean, or (`search`) for 4 bits the one of a list with the least error. The paper's
holds the largest value of every channel; a grid of 15 numbers is better spent on the many small values, as clipping
searches for weights and inputs have long found (ACIQ, arXiv 1810.05723; OMSE, arXiv 1902.06822). 8 bits keep the
paper's: clipping gains little where the steps are small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.flattenquant.flatten import (
    PADDED_TO,
    capped_threshold,
    copy_counts,
    copy_numbers,
    flatten_codes,
    flatten_index,
    flatten_threshold,
    outlier_counts,
    padded_counts,
)
from compress.row_errors import relative_error

BITS = (4, 8)
SHRINKAGE = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25)
"""Of the paper's threshold, what `search` tries: steps of about 2^(-1/4)."""

Threshold = Literal["mean", "search"]
Layer = tuple[Tensor, Tensor | None]
"""Weight [out, C] and bias [out] of a layer."""
Rounding = Callable[[Tensor, Tensor, int], Tensor]
"""(weight [out, C'], its inputs [rows, C'], bits) → the weight rounded as the model's will be, GPTQ left out."""


@dataclass(frozen=True)
class FlattenRule:
    """How every site is split, and on what grid its weights are.

    beta: of the threshold. threshold: β · mean for all, or searched for 4 bits. max_expansion: C'/C that no threshold
    may exceed, before padding. group_size: input channels per scale of the weights, None for one per output channel.
    observer: llmcompressor's, of their ranges.
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


@dataclass(frozen=True)
class SiteOptions:
    """What a site can have. splits: bits → how channels are split with so many. errors: bits → of the worst layer."""

    splits: Mapping[int, Split]
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Flattening:
    """What was decided for a site. bits: for weights and inputs. gamma: by which it got them."""

    options: SiteOptions
    bits: int
    gamma: float

    @property
    def split(self) -> Split:
        """Of the chosen bits."""
        return self.options.splits[self.bits]

    @property
    def scale(self) -> float:
        """Of the inputs: T / qmax."""
        return self.split.threshold / largest_code(self.bits)


def largest_code(bits: int) -> int:
    """7 or 127."""
    return int((1 << (bits - 1)) - 1)


def site_options(
    channel_max: Tensor, x: Tensor, layers: Sequence[Layer], rule: FlattenRule, round_weights: Rounding
) -> SiteOptions:
    """One site with 4 bits and with 8.

    channel_max: [C], max |x_j| over the calibration set; x: [rows, C], some of the set's inputs; layers: those that
    read them.
    """
    outputs = [linear(x, weight, bias) for weight, bias in layers]
    biases = [bias for _, bias in layers]
    whole = mean_split(channel_max, rule)
    splits, errors = {}, {}
    for bits in BITS:
        split, rounded = whole, rounded_columns(x, layers, whole, bits, round_weights)
        if bits == 4 and rule.threshold == "search":
            originals = [weight[:, copy_numbers(whole.index) == 0] for weight in rounded]
            split = best_split(x, outputs, [whole, *shrunk_splits(channel_max, rule)], bits, originals, biases)
            if split is not whole:
                rounded = rounded_columns(x, layers, split, bits, round_weights)
        splits[bits] = split
        errors[bits] = worst_error(outputs, quantized_copies(x, split, bits), rounded, biases)
    return SiteOptions(splits, errors)


def mean_split(channel_max: Tensor, rule: FlattenRule) -> Split:
    """By the paper's rule: no channel is cut off anywhere. T is raised to keep `max_expansion`."""
    threshold = flatten_threshold(channel_max, rule.beta)
    threshold = capped_threshold(channel_max, threshold, rule.max_expansion)
    return _padded(channel_max, copy_counts(channel_max, threshold), threshold, rule)


def shrunk_splits(channel_max: Tensor, rule: FlattenRule) -> list[Split]:
    """At t · β · mean for every t of SHRINKAGE, outliers split and ordinary channels cut off; none beyond the cap."""
    splits = []
    for shrinkage in SHRINKAGE:
        threshold = shrinkage * flatten_threshold(channel_max, rule.beta)
        counts = outlier_counts(channel_max, threshold)
        if int(counts.sum()) <= rule.max_expansion * len(channel_max):
            splits.append(_padded(channel_max, counts, threshold, rule))
    return splits


def _padded(channel_max: Tensor, counts: Tensor, threshold: float, rule: FlattenRule) -> Split:
    multiple = max(PADDED_TO, rule.group_size or 0)
    return Split(flatten_index(padded_counts(channel_max, counts, threshold, multiple)), threshold)


def best_split(
    x: Tensor,
    outputs: Sequence[Tensor],
    splits: Sequence[Split],
    bits: int,
    originals: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> Split:
    """The one of `splits` with the least error of the worst layer.

    originals: each layer's rounded weight [out, C], of which every split repeats columns. Rounding it anew for each
    would be most of the work, and repeated columns hardly move a range. x: [rows, C]; outputs: each layer's.
    """

    def error(split: Split) -> float:
        held = torch.zeros_like(x).index_add_(1, split.index, quantized_copies(x, split, bits))
        return worst_error(outputs, held, originals, biases)  # columns repeated, or their inputs added up: one product

    return min(splits, key=error)


def rounded_columns(
    x: Tensor, layers: Sequence[Layer], split: Split, bits: int, round_weights: Rounding
) -> list[Tensor]:
    """Ŵ' [out, C'] of each layer, as the model will have it for inputs x [rows, C]."""
    copies = quantized_copies(x, split, bits)
    return [round_weights(weight[:, split.index].contiguous(), copies, bits) for weight, _ in layers]


def worst_error(
    outputs: Sequence[Tensor], inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> float:
    """Relative error of the worst layer's x̂·Ŵᵀ + b against `outputs`, each [rows, out]. inputs: x̂; weights: each Ŵ."""
    return max(
        relative_error(output, linear(inputs, weight, bias))
        for output, weight, bias in zip(outputs, weights, biases, strict=True)
    )


def quantized_copies(x: Tensor, split: Split, bits: int) -> Tensor:
    """x̂' [rows, C'] of x [rows, C]: the copies' codes times their scale."""
    scale = split.threshold / largest_code(bits)
    return flatten_codes(torch.round(x / scale), split.index, largest_code(bits)) * scale
