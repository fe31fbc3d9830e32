"""An intermediate model as a task of the training loop."""

from functools import partial
from typing import Protocol

from torch import nn

from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import DraftVocabulary
from train.intermediate.rollout import HeldOutTexts
from train.loop.batches import Batch
from train.loop.task import Losses


class Objective(Protocol):
    """Tokens or Distribution (train/intermediate/objective.py)."""

    @property
    def vocabulary(self) -> DraftVocabulary: ...
    def losses(self, model: LanguageModel, batch: Batch) -> Losses: ...


class IntermediateTask:
    """What `model` learns, and how its checkpoints are judged: by acceptance, replayed on `held_out` texts.

    Not by loss: perplexity falls long after acceptance has stopped to rise (FastDraft). num_drafted: tokens a round in
    the replay.
    """

    def __init__(self, model: LanguageModel, objective: Objective, held_out: HeldOutTexts, num_drafted: int) -> None:
        self._model, self._objective, self._held_out = model, objective, held_out
        self._num_drafted = num_drafted

    @property
    def model(self) -> LanguageModel:
        return self._model

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses of one batch."""
        losses: Losses = model(partial(_losses, self._objective, batch))
        return losses

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """tau, acceptance_1 …, outside_vocabulary (train/replay.py)."""
        metrics: dict[str, float] = model(partial(_replay, self))
        return metrics

    def replay(self, model: LanguageModel) -> dict[str, float]:
        """The same of the model without its wrapper."""
        vocabulary = self._objective.vocabulary
        return self._held_out.replay_model(model, vocabulary, self._num_drafted).metrics()


def _losses(objective: Objective, batch: Batch, model: LanguageModel) -> Losses:
    return objective.losses(model, batch)


def _replay(task: IntermediateTask, model: LanguageModel) -> dict[str, float]:
    return task.replay(model)
