"""The training-time test's loss (EAGLE-3, arXiv 2503.01840, section 3.1).

Every step of every chain is scored by soft cross-entropy against the target's distribution for the token that it
drafts, restricted to the draft vocabulary; there is no regression of features. Step j weighs decay^j.

Deviation: a draft counts where the draft vocabulary has the token that the target *wrote*; published trainers ask for
the token that it finds likeliest. On greedy text these are the same. On sampled text a position then counts, on
average, by the share of the target's probability that the draft vocabulary covers, as it would in the loss over the
whole vocabulary; and the step saves the product with the target's whole lm_head that finding the likeliest token takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.chains import Chains, find_chains
from train.distillation import Drafts, Teacher, distill
from train.eagle.head import EagleHead
from train.eagle.unroll import unroll
from train.loop.batches import Batch
from train.loop.task import Losses


@dataclass(frozen=True)
class TrainingTimeTest:
    """What a head is trained for.

    num_steps: k, how far chains are unrolled. decay: step j's loss weighs decay^j. feature_columns: which of a batch's
    states the head reads, in its order. teacher_column: which is what enters the target's final norm.
    """

    teacher: Teacher
    in_vocabulary: Tensor
    num_steps: int
    decay: float
    feature_columns: tuple[int, ...]
    teacher_column: int

    def losses(self, head: EagleHead, batch: Batch) -> Losses:
        """Sums over the counted drafts: (chain, step) pairs whose token the target wrote and the draft vocabulary has.

        Metrics, as shares of that count: `cross_entropy` in nats; `agreement`, drafts that are the target's likeliest
        token; `outside_vocabulary`, drafts not counted because the draft vocabulary lacks their token.
        """
        assert batch.features is not None
        chains = find_chains(batch, self.num_steps)
        states = unroll(head, batch, read_columns(batch.features, self.feature_columns), chains)
        drafts, num_outside = self._drafts(states, batch, chains)
        scores = distill(drafts, head.lm_head.weight, self.teacher)
        metrics = {
            "cross_entropy": scores.cross_entropy,
            "agreement": scores.agreement,
            "outside_vocabulary": num_outside,
        }
        count = torch.tensor(float(len(drafts.token)), device=states.device)
        return Losses(scores.loss.float(), count, metrics)

    def _drafts(self, states: Tensor, batch: Batch, chains: Chains) -> tuple[Drafts, Tensor]:
        """The counted drafts, and how many are not counted for lack of their token."""
        assert batch.features is not None
        num_tokens, num_chains = len(batch.token_ids), len(chains.rows)
        sources = torch.stack([chains.read_tokens(step, num_tokens) for step in range(self.num_steps)])
        drafted = batch.token_ids[(sources + 1).clamp_(max=num_tokens - 1)]
        in_vocabulary = self.in_vocabulary.to(drafted.device)[drafted]
        step, chain = (chains.drafts_written & in_vocabulary).nonzero(as_tuple=True)
        source, order = sources[step, chain].sort(stable=True)
        tokens, which = source.unique_consecutive(return_inverse=True)
        weights = self.decay ** torch.arange(self.num_steps, dtype=torch.float32, device=states.device)
        drafts = Drafts(
            states=states.flatten(0, 1)[(step * num_chains + chain)[order]],
            teacher_states=batch.features[tokens, self.teacher_column],
            token=which,
            weight=weights[step[order]],
        )
        return drafts, (chains.drafts_written & ~in_vocabulary).sum().float()


def read_columns(features: Tensor, columns: tuple[int, ...]) -> Tensor:
    """The chosen states side by side. features: [T, L, H]. Returns [T, len(columns) · H]."""
    if columns == tuple(range(columns[0], columns[0] + len(columns))):
        return features[:, columns[0] : columns[0] + len(columns)].flatten(1)
    return features[:, list(columns)].flatten(1)
