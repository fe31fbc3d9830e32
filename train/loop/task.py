"""What the loop trains: a model, its losses on a batch, and its worth on held-out text."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from train.loop.batches import Batch


@dataclass(frozen=True)
class Losses:
    """One batch's loss as sums, so that gradients over several batches and processes weigh every position alike.

    total: scalar, float32: the sum over the counted positions; the loop differentiates it.
    count: scalar: how many positions that are. The loop divides by the count of the whole step.
    metrics: scalar sums by name, shown divided by the count; the same names for every batch.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


class Task(Protocol):
    """An EAGLE head, a causal language model, or whatever else learns from batches of conversations."""

    @property
    def model(self) -> nn.Module:
        """Holds every trained parameter (those that require a gradient). With `activation_recomputation` it must
        offer `gradient_checkpointing_enable()`, as models of transformers do."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses of one batch. Calls `model`, which is `self.model` or its distributed wrapper, exactly once and
        uses every trained parameter: the wrapper sums gradients over processes by these rules."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on held-out conversations; called in evaluation mode and without gradients.

        "tau", the acceptance length, must be among them: the checkpoint with the highest is the result. Runs in every
        process on the same weights, so it must not communicate.
        """
        ...
