"""How much a quantized target differs from its source: perplexity, KL divergence, agreement of the best token.

All three come from one pass over held-out tokens in which both models' logits exist for a slice of rows at a time and
are then dropped: nothing is stored.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS_AT_A_TIME = 128
"""Rows of logits held at once; at a vocabulary of 150k tokens and two models that is 150 MB."""


@dataclass(frozen=True)
class Quality:
    """Means over `num_tokens` predicted tokens.

    perplexity: exp of the mean negative log-likelihood of the next token. kl: mean KL(source ‖ model) over the whole
    vocabulary, in nats. agreement: share of positions where both rank the same token first.
    """

    perplexity: float
    kl: float
    agreement: float
    num_tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compare_rows(source_logits: Tensor, model_logits: Tensor, targets: Tensor) -> tuple[float, float, float, int]:
    """Sums over rows: (source's negative log-likelihood, the model's, KL(source ‖ model), equal best tokens).

    source_logits, model_logits: [rows, vocabulary]; targets: [rows], the tokens that follow.
    """
    source = torch.log_softmax(source_logits.float(), -1)
    model = torch.log_softmax(model_logits.float(), -1)
    source_nll, model_nll = (-each.gather(1, targets[:, None]).sum() for each in (source, model))
    kl = (source.exp() * (source - model)).sum(-1).clamp(min=0).sum()
    num_same = (source_logits.argmax(-1) == model_logits.argmax(-1)).sum()
    return float(source_nll), float(model_nll), float(kl), int(num_same)


@torch.inference_mode()
def measure(
    source: PreTrainedModel,
    model: PreTrainedModel,
    sequences: Iterable[Sequence[int]],
    *,
    on_tokens: Callable[[int], None] = lambda _num: None,
) -> tuple[Quality, Quality]:
    """(the model's quality, the source's) on held-out token sequences, each at least two tokens long.

    source, model: causal models. on_tokens: called with the number of predicted tokens of each
    sequence. Raises ValueError without sequences.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for sequence in sequences:
        ids = torch.tensor([list(sequence)])
        states = [_hidden(each, ids)[0, :-1] for each in (source, model)]
        targets = ids[0, 1:]
        for begin in range(0, len(targets), ROWS_AT_A_TIME):
            rows = slice(begin, begin + ROWS_AT_A_TIME)
            logits = [each.lm_head(hidden[rows]) for each, hidden in zip((source, model), states, strict=True)]
            sums += torch.tensor(compare_rows(logits[0], logits[1], targets[rows]), dtype=torch.float64)
        num_tokens += len(targets)
        on_tokens(len(targets))
    if num_tokens == 0:
        raise ValueError("no held-out tokens to measure on; raise calibrate's held-out budgets")
    source_nll, model_nll, kl, num_same = (sums / num_tokens).tolist()
    return Quality(math.exp(model_nll), kl, num_same, num_tokens), Quality(math.exp(source_nll), 0.0, 1.0, num_tokens)


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The final hidden states [1, tokens, hidden], before the head."""
    return model.model(ids, use_cache=False).last_hidden_state
