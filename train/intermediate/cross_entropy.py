"""Cross-entropy of the text's own tokens (sequence-level distillation), a slice of logits at a time.

loss = Σ_i −log q_i(y_i),     d loss / d logits_i = q_i − 1[y_i]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.sliced_head import head_loss

LOGITS_PER_SLICE = 640 * 8192
"""Held at once: 20 MB in float32, whatever the vocabulary."""
MIN_ROWS = 32
ROWS_PER_BLOCK = 32
"""Rows at a time that stay in the processor's cache while they turn from logits into gradients."""


class TokenScores(NamedTuple):
    """Sums over tokens: the cross-entropy in nats, and how many are the model's likeliest."""

    loss: Tensor
    agreement: Tensor


def score_tokens(states: Tensor, rows: Tensor, labels: Tensor) -> TokenScores:
    """Scores of tokens; `loss` is differentiable with respect to states and rows.

    states: [N, H], ready for lm_head. rows: [D, H], its rows. labels: int64 [N], which row each token is.
    """

    def score(part: slice, logits: Tensor) -> Tensor:
        return _score_and_differentiate(logits, labels[part])

    num_rows = max(LOGITS_PER_SLICE // len(rows), MIN_ROWS)
    return TokenScores(*head_loss(states, rows, score, num_sums=2, rows_per_slice=num_rows))


def _score_and_differentiate(logits: Tensor, labels: Tensor) -> Tensor:
    """The two sums of `TokenScores` for a slice; `logits` [n, D] become q − 1[y] in place."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = torch.zeros(2, dtype=dtype, device=logits.device)
    for begin in range(0, len(logits), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        log_probabilities = logits[block].log_softmax(-1, dtype=dtype)
        own = log_probabilities.gather(1, labels[block, None])
        agreement = own[:, 0] >= log_probabilities.amax(-1)
        sums += torch.stack([-own.sum(), agreement.sum()])
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, labels[block, None], torch.full_like(own, -1.0))
        logits[block] = gradient
    return sums
