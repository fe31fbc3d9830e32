"""What a site can have, and what that loses: functions of tensors.

Measured is the output error of a site's worst layer (compress/row_errors.py) with weights and inputs of 4 bits and of
8, the bias included and the weights rounded to nearest on the grid that is written; GPTQ, which comes later, is left
out. Weights count as well as inputs. Which sites then get 4 bits is decided for all together (`bits`), and how each
number of bits is split by the paper's rule (`splits`) or what loses least (`search`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear, pad

from compress.flattenquant.search import ReadingLayers, Seen, roomy_split, shrunk_split, worst_error
from compress.flattenquant.splits import FlattenRule, Split, largest_code, mean_split, quantized_copies

BITS = (4, 8)

Layer = tuple[Tensor, Tensor | None]
"""Weight [out, C] and bias [out] of a layer."""
Rounding = Callable[[Tensor, Tensor, int], Tensor]
"""(weight [out, C'], its inputs [rows, C'], bits) → the weight rounded as the model's will be, GPTQ left out."""


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


def site_options(
    parts: Sequence[Seen], layers: Sequence[Layer], rule: FlattenRule, round_weights: Rounding
) -> SiteOptions:
    """One site with 4 bits and with 8. parts: what each part of the calibration set showed; layers: those that read."""
    seen = Seen.together(parts)
    x, biases = seen.rows, [bias for _, bias in layers]
    outputs = [linear(x, weight, bias) for weight, bias in layers]
    whole = mean_split(seen.channel_max, rule)
    splits, errors = {}, {}
    for bits in BITS:
        split = whole
        if rule.threshold == "search":
            weights = [weight for weight, _ in layers]
            originals = [_rounded(weight, x, bits, rule.group_size, round_weights) for weight in weights]
            reading = ReadingLayers(weights, originals, biases)
            split = shrunk_split(seen, reading, rule) if bits == 4 else roomy_split(parts, reading, rule)
        splits[bits] = split
        rounded = rounded_columns(x, layers, split, bits, round_weights)
        errors[bits] = worst_error(outputs, quantized_copies(x, split, bits), rounded, biases)
    return SiteOptions(splits, errors)


def _rounded(weight: Tensor, x: Tensor, bits: int, group_size: int | None, round_weights: Rounding) -> Tensor:
    """Ŵ [out, C] of a weight that nobody has split: columns of 0 fill its last group."""
    missing = -weight.shape[1] % (group_size or 1)
    return round_weights(pad(weight, (0, missing)), pad(x, (0, missing)), bits)[:, : weight.shape[1]]


def rounded_columns(
    x: Tensor, layers: Sequence[Layer], split: Split, bits: int, round_weights: Rounding
) -> list[Tensor]:
    """Ŵ' [out, C'] of each layer, as the model will have it for inputs x [rows, C]."""
    copies = quantized_copies(x, split, bits)
    return [round_weights(weight[:, split.index].contiguous(), copies, bits) for weight, _ in layers]
