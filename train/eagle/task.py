"""An EAGLE-3 head as a task of the training loop."""

from functools import partial

from torch import Tensor, nn

from train.eagle.head import EagleHead
from train.eagle.objective import TrainingTimeTest
from train.eagle.rollout import HeldOut
from train.loop.batches import Batch
from train.loop.task import Losses


class EagleTask:
    """What is learned (`objective`) by `head`, and how its checkpoints are judged: by replay on `held_out` texts.

    draft_ids: int64 [D], the target's ids of the draft vocabulary, ascending. num_drafted: tokens a round in the
    replay.
    """

    def __init__(
        self, head: EagleHead, objective: TrainingTimeTest, held_out: HeldOut, draft_ids: Tensor, num_drafted: int
    ) -> None:
        self._head, self._objective, self._held_out = head, objective, held_out
        self._draft_ids, self._num_drafted = draft_ids, num_drafted

    @property
    def model(self) -> EagleHead:
        return self._head

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses of one batch, whose features are those that the objective expects."""
        losses: Losses = model(partial(_losses, self._objective, batch))
        return losses

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """tau, acceptance_1 …, outside_vocabulary (train/eagle/rollout.py)."""
        metrics: dict[str, float] = model(partial(_replay, self._held_out, self._draft_ids, self._num_drafted))
        return metrics


def _losses(objective: TrainingTimeTest, batch: Batch, head: EagleHead) -> Losses:
    return objective.losses(head, batch)


def _replay(held_out: HeldOut, draft_ids: Tensor, num_drafted: int, head: EagleHead) -> dict[str, float]:
    return held_out.replay(head, draft_ids.to(head.fc.weight.device), num_drafted).metrics()
