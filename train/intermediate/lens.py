"""A head for layers that were not followed by it: fitted in closed form, so that training starts from words.

The target's lm_head does not read what its first layers leave, and between those and the last ones most is missing. A
linear map can read it for the head: the tuned lens (arXiv 2303.08112; linear maps between layers: arXiv 2303.09435).
Deviation: the map is least squares on the target's states after its final norm, in one pass over some text, where the
tuned lens is trained on distributions; and it becomes part of lm_head, so it costs nothing when tokens are drafted.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.features import FeatureSource
from train.intermediate.language_model import LanguageModel
from train.loop.batches import BatchPlan, Position, TokenSequence

RIDGE = 1e-3
"""Added to the mean squares of inputs, in units of them: on SmolLM2-135M any of 1e-4 to 1e-2 gives the same."""
TOKENS_PER_BATCH = 512


@torch.no_grad()
def fit_lens(
    model: LanguageModel,
    sequences: Sequence[TokenSequence],
    source: FeatureSource,
    read: Callable[[Tensor], Tensor],
    *,
    num_tokens: int,
    seed: int,
    on_tokens: Callable[[int], None] = lambda _count: None,
) -> Tensor:
    """The matrix [H_target, H] that takes the model's states, ready for lm_head, nearest to the target's.

    sequences: texts, of which `num_tokens` tokens or a few more are read, in an order that follows from `seed`; the
    first token of each, of which no model says much, is left out. source: of the target's states at one layer or more,
    what enters its final norm last. read: the target's final norm. on_tokens: told how many were read.
    """
    plan = BatchPlan(sequences, tokens_per_batch=TOKENS_PER_BATCH, max_length=TOKENS_PER_BATCH, seed=seed)
    device = model.head.device
    squares = products = torch.zeros((), dtype=torch.float64, device=device)
    num_read = 0
    for step in plan.steps(Position(), 1):
        (indices,) = step.batches
        batch = plan.batch(indices).to(device)
        kept = batch.position > 0
        states = model.states(batch)[kept].double()
        theirs = read(_last(source.capture([plan.token_ids(index) for index in indices])).to(device))[kept].double()
        squares, products = squares + states.t() @ states, products + states.t() @ theirs
        num_read += step.num_tokens
        on_tokens(step.num_tokens)
        if num_read >= num_tokens or step.end.epoch:  # all of them once
            break
    return _solve(squares, products)


def _last(features: Sequence[npt.NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(features)[:, -1].copy())


def _solve(squares: Tensor, products: Tensor) -> Tensor:
    """Ridge regression with every input scaled to a mean square of one."""
    scale = squares.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scaled = squares * scale * scale[:, None] + RIDGE * torch.eye(len(scale), dtype=torch.float64, device=scale.device)
    return (torch.linalg.solve(scaled, products * scale[:, None]) * scale[:, None]).t().float()
