"""Where a head starts: not from noise, but from the target's own last step, or from a head that was trained before.

lm_head gets the target's rows of the draft vocabulary, the final norm the target's weight, and fc passes the last of
the fused states through: a state like the target's last one is then read as the target reads it. The norm's weight is
made smaller, for a head that has learnt nothing should not be sure: at full size it starts several nats worse than
chance. The decoder layer keeps its random start.

A head that was trained before goes on with all that it has; of draft tokens that it lacked, lm_head's rows start from
the target's.
"""

import torch
from torch import Tensor

from deploy.formats.model_dir import ModelDirectory
from deploy.formats.speculators import EagleDirectory
from train.distillation import Teacher
from train.eagle.head import EagleHead


def target_embedding(target: ModelDirectory) -> Tensor:
    """The target's embedding, float32 [V, H]."""
    return torch.from_numpy(target.float32("model.embed_tokens.weight").copy())


def target_rows(target: ModelDirectory, draft_ids: Tensor) -> Tensor:
    """The target's lm_head rows of the draft vocabulary, float32 [D, H]."""
    name = "model.embed_tokens.weight" if target.shape.tied_embeddings else "lm_head.weight"
    return torch.from_numpy(target.rows_float32(name, draft_ids.numpy()).copy())


def target_norm(target: ModelDirectory) -> Tensor:
    """The weight of the target's final norm, float32 [H]."""
    return torch.from_numpy(target.float32("model.norm.weight").copy())


def make_teacher(target: ModelDirectory, draft_ids: Tensor) -> Teacher:
    """The target's last step over the draft vocabulary. draft_ids: int64 [D], ascending."""
    return Teacher(target_norm(target), target_rows(target, draft_ids), target.shape.rms_norm_eps)


CONFIDENCE = 0.3
"""The final norm's weight at the start, in units of the target's; chosen by short runs on SmolLM2-135M."""


@torch.no_grad()
def start_from_target(head: EagleHead, target: ModelDirectory, draft_ids: Tensor) -> None:
    """Set the head's lm_head, norm and fc from the target."""
    hidden_size = head.config.layer.hidden_size
    head.lm_head.weight.copy_(target_rows(target, draft_ids))
    head.norm.weight.copy_(CONFIDENCE * target_norm(target))
    head.fc.weight.zero_()
    head.fc.weight[:, -hidden_size:].copy_(torch.eye(hidden_size))


@torch.no_grad()
def start_from_head(head: EagleHead, trained: EagleDirectory, draft_ids: Tensor) -> None:
    """Set the weights from a trained head of the same shape; its draft vocabulary may be another.

    draft_ids: int64 [D], the target's ids of `head`'s draft vocabulary, whose rows of lm_head are set already.
    """
    weights = {name: torch.from_numpy(values) for name, values in trained.weights().items()}
    known = torch.from_numpy(trained.draft_ids)
    for name, parameter in head.named_parameters():
        if parameter is not head.lm_head.weight:
            parameter.copy_(weights[name])
    has_row = torch.isin(draft_ids, known)
    head.lm_head.weight[has_row] = weights["lm_head.weight"][torch.searchsorted(known, draft_ids[has_row])]
