"""Which threshold loses least, with 4 bits and with 8: functions of tensors.

The paper's threshold holds the largest value of every channel that calibration saw. With 4 bits that is too much: a
grid of 15 numbers is better spent on the many small values, as clipping searches for weights and inputs have long
found (ACIQ, arXiv 1810.05723; OMSE, arXiv 1902.06822). With 8 bits it is too little: steps are small enough to spare,
and other texts have larger values, which calibration's own rows do not show. So there every candidate is tried on one
half of the samples with the largest values of the other.

Weights are rounded once, before their columns are repeated: rounding them anew for every candidate would be most of
the work, and repeated columns hardly move a range.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.flattenquant.flatten import copy_counts, flatten_index, flatten_threshold, outlier_counts
from compress.flattenquant.splits import FlattenRule, Split, mean_split, padded_split, quantized_channels
from compress.row_errors import relative_error

SHRINKAGE = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25)
"""Of the paper's threshold, what is tried with 4 bits: steps of about 2^(-1/4)."""
WIDENING = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the paper's threshold, raised to the cap where it is below, what is tried with 8 bits."""
HEADROOM = (1.0, 1.5, 2.0)
"""Of the largest value of a channel, what its copies can hold together, tried with 8 bits."""
AS_GOOD = 1.03
"""Of the candidates whose error is at most so many times the least, the one with the fewest columns is taken."""


@dataclass(frozen=True)
class Seen:
    """What some of the calibration samples showed of a site. channel_max: [C], max |x_j|; rows: some inputs [n, C]."""

    channel_max: Tensor
    rows: Tensor

    @classmethod
    def together(cls, parts: Sequence["Seen"]) -> "Seen":
        """What all of them showed."""
        largest = torch.stack([part.channel_max for part in parts]).amax(0)
        return cls(largest, torch.cat([part.rows for part in parts]))


@dataclass(frozen=True)
class ReadingLayers:
    """The layers that read a site. weights: [out, C] each, as they are; rounded: the same on their grid; biases: [out].

    A channel's copies have the same weights here, so their inputs add up.
    """

    weights: Sequence[Tensor]
    rounded: Sequence[Tensor]
    biases: Sequence[Tensor | None]

    def errors(self, x: Tensor, splits: Iterable[Split], bits: int) -> list[float]:
        """Of the worst layer, with inputs x [rows, C] split in each of these ways."""
        outputs = [linear(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return [worst_error(outputs, quantized_channels(x, split, bits), self.rounded, self.biases) for split in splits]


def worst_error(
    outputs: Sequence[Tensor], inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> float:
    """Relative error of the worst layer's x̂·Ŵᵀ + b against `outputs`, each [rows, out]. inputs: x̂; weights: each Ŵ."""
    return max(
        relative_error(output, linear(inputs, weight, bias))
        for output, weight, bias in zip(outputs, weights, biases, strict=True)
    )


def shrunk_split(seen: Seen, layers: ReadingLayers, rule: FlattenRule) -> Split:
    """For 4 bits: the paper's split, or one of `shrunk_splits`, whichever loses least on the rows."""
    splits = [mean_split(seen.channel_max, rule), *shrunk_splits(seen.channel_max, rule)]
    errors = layers.errors(seen.rows, splits, bits=4)
    return splits[errors.index(min(errors))]


def shrunk_splits(channel_max: Tensor, rule: FlattenRule) -> list[Split]:
    """At t · β · mean for every t of SHRINKAGE, outliers split and ordinary channels cut off; none beyond the cap."""
    splits = []
    for shrinkage in SHRINKAGE:
        threshold = shrinkage * flatten_threshold(channel_max, rule.beta)
        counts = outlier_counts(channel_max, threshold)
        if int(counts.sum()) <= rule.max_expansion * len(channel_max):
            splits.append(padded_split(channel_max, counts, threshold, rule))
    return splits


def roomy_split(parts: Sequence[Seen], layers: ReadingLayers, rule: FlattenRule) -> Split:
    """For 8 bits: of `roomy_counts`, what loses least on each part's rows with the other parts' largest values.

    Of those that are `AS_GOOD` it takes the one with the fewest columns. One part has no others: the paper's split.
    """
    seen = Seen.together(parts)
    whole = mean_split(seen.channel_max, rule)
    if len(parts) == 1:
        return whole
    tried = roomy_counts(seen.channel_max, whole.threshold, rule)
    lost = [0.0] * len(tried)
    for place, part in enumerate(parts):
        others = Seen.together([*parts[:place], *parts[place + 1 :]]).channel_max
        by_others = (Split(flatten_index(copy_counts(room * others, t)), t) for t, room, _ in tried)
        lost = [sum(pair) for pair in zip(lost, layers.errors(part.rows, by_others, bits=8), strict=True)]
    splits = [padded_split(seen.channel_max, counts, t, rule) for t, _, counts in tried]
    good = [place for place, error in enumerate(lost) if error <= AS_GOOD * min(lost)]
    return splits[min(good, key=lambda place: (len(splits[place].index), lost[place]))]


def roomy_counts(channel_max: Tensor, threshold: float, rule: FlattenRule) -> list[tuple[float, float, Tensor]]:
    """(T, room, copies [C]) for every T of WIDENING · threshold and room of HEADROOM; none beyond the cap.

    Copies hold `room` times the largest value that was seen. threshold: with which a room of 1 is within the cap.
    """
    found = []
    for widening in WIDENING:
        for room in HEADROOM:
            counts = copy_counts(room * channel_max, widening * threshold)
            if int(counts.sum()) <= rule.max_expansion * len(channel_max):
                found.append((widening * threshold, room, counts))
    return found
