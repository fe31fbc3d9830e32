"""Splitting large input channels: FlattenQuant (arXiv 2402.17985), section 3, as pure functions of tensors.

A channel whose largest value m_j exceeds the threshold T is carried by n_j = ⌈m_j / T⌉ copies, each of which holds at
most T, and the weight's column is repeated for each of them. Copies sum to the channel's value exactly, so one scale
T / qmax serves the whole layer, and it is as small as the ordinary channels need.

Deviations: T is raised where the layer would grow beyond a cap; columns are padded to a multiple of the kernels' width
with further copies, which take what calibration never saw; on request only a boxplot's outliers are split, ordinary
channels being cut off at T (`outlier_counts`), or copies hold more than the largest value that was seen (`search`).
"""

import torch
from torch import Tensor

PADDED_TO = 32
"""The runtime's kernels take 32 input channels at a time."""


def flatten_threshold(channel_max: Tensor, beta: float) -> float:
    """T = beta · mean(m_j) over channels that are no outliers of a boxplot: m_j ≤ Q3 + 1.5·(Q3 − Q1).

    channel_max: [C], max |x_j| over the calibration set. Returns a positive number in the same unit; 1 where no input
    was ever anything but 0, which any threshold serves. Raises ValueError when beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta} must be above 0")
    m = channel_max.double()
    threshold = beta * float(m[m <= boxplot_fence(m)].mean())
    return threshold or float(m.max()) or 1.0


def boxplot_fence(channel_max: Tensor) -> float:
    """Q3 + 1.5·(Q3 − Q1) of the channels' maxima [C], in their unit: channels beyond it are outliers."""
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
    q1, q3 = torch.quantile(channel_max.double(), quartiles).tolist()
    return float(q3 + 1.5 * (q3 - q1))


def copy_counts(channel_max: Tensor, threshold: float) -> Tensor:
    """Copies that each input channel needs so that none holds more than `threshold`: n_j = max(1, ⌈m_j / T⌉).

    channel_max: [C], in the unit of `threshold`. Returns int64 [C]. Raises ValueError when threshold is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold={threshold} must be above 0")
    return torch.ceil(channel_max.double() / threshold).long().clamp(min=1)


def outlier_counts(channel_max: Tensor, threshold: float) -> Tensor:
    """Copies where only outliers are split: ⌈m_j / T⌉ beyond the boxplot's fence, 1 elsewhere.

    An ordinary channel is cut off at T; an outlier never is, for the first tokens' massive activations lie in outliers
    and their neighbours cannot stand in for them. channel_max: [C], in the unit of `threshold`. Returns int64 [C].
    Raises ValueError when threshold is not positive.
    """
    counts = copy_counts(channel_max, threshold)
    return torch.where(channel_max.double() > boxplot_fence(channel_max), counts, 1)


def capped_threshold(channel_max: Tensor, threshold: float, max_expansion: float) -> float:
    """The smallest threshold from `threshold` on under which C' = Σ n_j is at most max_expansion · C, before padding.

    Raises ValueError when max_expansion is below 1, which no threshold gives.
    """
    if max_expansion < 1:
        raise ValueError(f"max_expansion={max_expansion} must be 1 or more")
    limit = max_expansion * len(channel_max)

    def fits(candidate: float) -> bool:
        return int(copy_counts(channel_max, candidate).sum()) <= limit

    if fits(threshold):
        return threshold
    low, high = threshold, float(channel_max.double().max())  # at the maximum every channel has one copy
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def padded_counts(channel_max: Tensor, counts: Tensor, threshold: float, multiple: int = PADDED_TO) -> Tensor:
    """`counts` with copies added until their sum is a multiple of `multiple`.

    Each goes to the channel that is nearest to saturation by then, the one with the largest m_j / (n_j · T). On
    calibrated inputs an added copy holds 0; on others it takes what would have been cut off. Returns int64 [C].
    """
    counts = counts.clone()
    for _ in range(-int(counts.sum()) % multiple):
        counts[int(torch.argmax(channel_max.double() / (counts * threshold)))] += 1
    return counts


def flatten_index(counts: Tensor) -> Tensor:
    """The channel that each column carries: int64 [C'], non-decreasing, channel j counts[j] times."""
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def copy_numbers(index: Tensor) -> Tensor:
    """k of each column: how many earlier columns carry the same channel. index: [C'], non-decreasing. int64 [C']."""
    return torch.arange(len(index)) - torch.searchsorted(index, index)


def counts_of(index: Tensor) -> Tensor:
    """Copies of each channel, int64 [C]: the inverse of `flatten_index`."""
    return torch.bincount(index)


def flatten(x: Tensor, index: Tensor, threshold: float) -> Tensor:
    """The copies of every value, before any rounding: copy k carries sign(x) · clip(|x| − k·T, 0, T).

    x: [..., C]. Returns [..., C']; the copies of a channel sum to x where |x| ≤ n_j · T, and saturate beyond.
    """
    k = copy_numbers(index)
    chosen = x[..., index]
    return chosen.sign() * (chosen.abs() - k * threshold).clamp(0, threshold)


def flatten_codes(codes: Tensor, index: Tensor, qmax: int) -> Tensor:
    """The copies of integer codes that were not clamped: what the runtime computes (docs/numerics.md).

    codes: [..., C], whole numbers in a float type. Copy k carries clamp(c − k·qmax, 0, qmax) + clamp(c + k·qmax, −qmax,
    0). Returns [..., C'] in the same type.
    """
    offset = copy_numbers(index) * qmax
    chosen = codes[..., index]
    return (chosen - offset).clamp(0, qmax) + (chosen + offset).clamp(-qmax, 0)
