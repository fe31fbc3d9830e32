"""Soft cross-entropy of a drafter against the target, over the draft vocabulary, a slice of logits at a time.

    loss = Σ_i w_i · −Σ_v p_i(v) log q_i(v),     d loss / d logits_i = w_i (q_i − p_i)        (Σ_v p_i(v) = 1)

Drafts of one token by different steps have the same target distribution: they lie side by side, and it is computed
once for all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.elementwise import rms_normalize
from train.products import linear, product_dtype
from train.sliced_head import head_loss

ROWS_PER_SLICE = 640
"""Rows of logits at once: enough for products to run at full speed, and 20 MB with a vocabulary of 8192."""
ROWS_PER_BLOCK = 32
"""Rows at a time that stay in the processor's cache while they turn from logits into gradients."""


class Teacher(nn.Module):
    """The target's last step: its distribution over the draft vocabulary, from what enters its final norm.

    norm: float [H], the target's final norm. rows: float [D, H], its lm_head's rows of the draft vocabulary.
    """

    rows: Tensor

    def __init__(self, norm: Tensor, rows: Tensor, rms_norm_eps: float) -> None:
        super().__init__()
        self.rms_norm_eps = rms_norm_eps
        self.register_buffer("rows", rows * norm, persistent=False)

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """states: float [n, H] before the final norm. rows: of `self.rows`, in another type. Returns [n, D]."""
        return linear(rms_normalize(states, self.rms_norm_eps), self.rows if rows is None else rows)


class Drafts(NamedTuple):
    """What is scored, drafts of the same token side by side.

    states: [N, H], ready for lm_head. teacher_states: [M, H] before the target's final norm, one for every token.
    token: int64 [N], ascending, which of the M each draft is of. weight: float [N].
    """

    states: Tensor
    teacher_states: Tensor
    token: Tensor
    weight: Tensor


class Scores(NamedTuple):
    """Sums over drafts: the weighted loss, the cross-entropy, and how many drafts are the target's likeliest token."""

    loss: Tensor
    cross_entropy: Tensor
    agreement: Tensor


def distill(drafts: Drafts, lm_head: Tensor, teacher: Teacher) -> Scores:
    """Scores of `drafts`; `loss` is differentiable with respect to their states and lm_head [D, H]."""
    teacher_rows = teacher.rows.to(product_dtype(teacher.rows))  # once, not for every slice

    def score(part: slice, logits: Tensor) -> Tensor:
        tokens, which = drafts.token[part].unique_consecutive(return_inverse=True)
        teacher_logits = teacher.logits(drafts.teacher_states[tokens], teacher_rows)
        return _score_and_differentiate(logits, teacher_logits, which, drafts.weight[part])

    sums = head_loss(drafts.states, lm_head, score, num_sums=3, rows_per_slice=ROWS_PER_SLICE, weight=drafts.weight)
    return Scores(*sums)


def _score_and_differentiate(logits: Tensor, teacher_logits: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    """The three sums of `Scores` for a slice; `logits` [n, D] become q − p in place."""
    probabilities = teacher_logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    likeliest = probabilities.argmax(-1)
    sums = weight.new_zeros(3, dtype=probabilities.dtype)
    for begin in range(0, len(logits), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        target = probabilities[which[block]]
        log_draft = logits[block].log_softmax(-1, dtype=target.dtype)
        cross_entropy = -torch.linalg.vecdot(target, log_draft)
        best = log_draft.gather(1, likeliest[which[block], None])[:, 0]
        agreement = best >= log_draft.amax(-1)
        sums += torch.stack([cross_entropy @ weight[block].to(target.dtype), cross_entropy.sum(), agreement.sum()])
        logits[block] = log_draft.exp_().sub_(target)
    return sums
