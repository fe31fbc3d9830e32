"""What an intermediate model learns from a batch: the tokens that the target wrote, or its distribution for them.

FastDraft (arXiv 2411.11055) aligns a draft by *sequence-level* distillation: cross-entropy on texts that
the target wrote. *Token-level* distillation, against the target's own distribution at every token, is there to compare
(`Distribution`); the target's states come from the runtime that serves it, as for an EAGLE head.

Where the draft vocabulary is smaller than the target's, logits are computed for its tokens alone, and a token outside
it is not counted: it will never be drafted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.distillation import Drafts, Teacher, distill
from train.intermediate.cross_entropy import score_tokens
from train.intermediate.language_model import LanguageModel
from train.loop.batches import Batch
from train.loop.task import Losses


@dataclass(frozen=True)
class DraftVocabulary:
    """Which tokens may be drafted.

    ids: int64 [D], the target's, ascending. places: int64 [V], where each of the target's tokens stands in `ids`; −1
    where it does not.
    """

    ids: Tensor
    places: Tensor

    @classmethod
    def of(cls, ids: Tensor, vocab_size: int) -> "DraftVocabulary":
        """ids: int64 [D], ascending, of `vocab_size`."""
        places = torch.full((vocab_size,), -1, dtype=torch.int64)
        places[ids] = torch.arange(len(ids))
        return cls(ids, places)

    def to(self, device: torch.device) -> "DraftVocabulary":
        return DraftVocabulary(self.ids.to(device), self.places.to(device))

    def rows(self, head: Tensor) -> Tensor:
        """lm_head's rows [D, H] of these tokens."""
        return head if len(self.ids) == len(head) else head[self.ids]


@dataclass(frozen=True)
class Tokens:
    """Sequence-level distillation: cross-entropy of the text's tokens."""

    vocabulary: DraftVocabulary

    def losses(self, model: LanguageModel, batch: Batch) -> Losses:
        """Sums over the counted tokens: those to learn from that the draft vocabulary has."""
        before, labels, num_outside = _counted(batch, self.vocabulary)
        states = model.states(batch)[before]
        scores = score_tokens(states, self.vocabulary.rows(model.head), labels)
        count = torch.tensor(float(len(labels)), device=states.device)
        metrics = {"cross_entropy": scores.loss.detach(), "agreement": scores.agreement}
        return Losses(scores.loss.float(), count, {**metrics, "outside_vocabulary": num_outside})


@dataclass(frozen=True)
class Distribution:
    """Token-level distillation: soft cross-entropy against the target's distribution over the draft vocabulary.

    teacher_column: which of a batch's states is what enters the target's final norm.
    """

    vocabulary: DraftVocabulary
    teacher: Teacher
    teacher_column: int = 0

    def losses(self, model: LanguageModel, batch: Batch) -> Losses:
        """As of `Tokens`; `agreement` is with the target's likeliest token."""
        assert batch.features is not None
        before, labels, num_outside = _counted(batch, self.vocabulary)
        states = model.states(batch)[before]
        drafts = Drafts(
            states=states,
            teacher_states=batch.features[before, self.teacher_column],
            token=torch.arange(len(labels), device=states.device),
            weight=torch.ones(len(labels), device=states.device),
        )
        scores = distill(drafts, self.vocabulary.rows(model.head), self.teacher)
        count = torch.tensor(float(len(labels)), device=states.device)
        metrics = {"cross_entropy": scores.cross_entropy, "agreement": scores.agreement}
        return Losses(scores.loss.float(), count, {**metrics, "outside_vocabulary": num_outside})


def _counted(batch: Batch, vocabulary: DraftVocabulary) -> tuple[Tensor, Tensor, Tensor]:
    """Int64 [N]: the tokens before those to learn from, and the places of these in the draft vocabulary; and how many
    are not counted for lack of a place. A conversation's first token has none before it."""
    learned = batch.loss_mask & (batch.position > 0)
    places = vocabulary.places[batch.token_ids]
    tokens = (learned & (places >= 0)).nonzero()[:, 0]
    return tokens - 1, places[tokens], (learned & (places < 0)).sum().float()
