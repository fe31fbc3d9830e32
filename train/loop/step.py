"""One optimizer step: gradients of a few batches, normalised, clipped, guarded against non-finite values.

The gradient is that of the mean loss over all positions counted in the step's batches, on all processes. Sums are
differentiated and the gradient is scaled once, by the step's count and by clipping together. (A mean of the batches'
means would weigh a position by how many others share its batch.)
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from train.loop.batches import Batch
from train.loop.model_state import trained_parameters
from train.loop.optimizer import Optimizer
from train.loop.settings import TrainSettings
from train.loop.task import Losses, Task


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave, over all processes.

    loss: sum over `count` positions. metrics: sums, by name. gradient_norm: of the mean loss, before clipping.
    """

    loss: float
    count: float
    metrics: dict[str, float]
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the parameters were updated; a step with a non-finite loss or gradient leaves them as they were."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Stepper:
    """The model as accelerate wraps it, its optimizer, and the step that updates both.

    Autocast is entered here rather than through accelerate's `mixed_precision`: that rewrites the model's `forward`
    for good, and cannot change within a Python process, which may train several models.
    """

    def __init__(self, task: Task, settings: TrainSettings, accelerator: Accelerator) -> None:
        self.precision = settings.resolve_precision(accelerator.device)
        self._task, self._accelerator, self._clip = task, accelerator, settings.clip
        if settings.activation_recomputation:
            enable = getattr(task.model, "gradient_checkpointing_enable", None)
            if enable is None:
                kind = type(task.model).__name__
                raise ValueError(f"activation_recomputation=true: {kind} cannot recompute activations; set it to false")
            enable()
        self._model = accelerator.prepare_model(task.model.to(accelerator.device)).train()
        self._parameters = list(trained_parameters(task.model).values())
        self.optimizer = Optimizer(
            task.model,
            settings.optimizer,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
        )

    def step(self, batches: Iterator[Batch], num_batches: int, learning_rate: float) -> StepOutcome:
        """Learn from this process's next `num_batches` batches."""
        self.optimizer.zero_grad()
        sums: Tensor | None = None
        for index in range(num_batches):
            is_last = index == num_batches - 1
            # Gradients are summed over processes once, with the last batch.
            with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                losses = self._losses(next(batches))
                self._accelerator.backward(losses.total)
            added = torch.stack([losses.total, losses.count, *losses.metrics.values()]).detach().double()
            sums = added if sums is None else sums + added
        assert sums is not None
        outcome, scale = self._outcome(sums, list(losses.metrics))
        if outcome.is_finite:
            torch._foreach_mul_(self._gradients(), scale)
            self.optimizer.step(learning_rate)
        return outcome

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the model as it is. Every process computes the same."""
        self._task.model.eval()
        with self._autocast():
            metrics = self._task.evaluate(self._task.model)
        self._task.model.train()
        assert math.isfinite(metrics["tau"]), f"tau={metrics['tau']}"
        return metrics

    def _losses(self, batch: Batch) -> Losses:
        with self._autocast():
            return self._task.losses(self._model, batch.to(self._accelerator.device))

    def _outcome(self, sums: Tensor, names: list[str]) -> tuple[StepOutcome, float]:
        """The step's outcome, and by what its gradients as they are must be multiplied. Waits for the device once."""
        norm = torch.nn.utils.get_total_norm(self._gradients()).double()
        sums = self._accelerator.reduce(sums, reduction="sum")
        raw_norm, loss, count, *metrics = torch.cat([norm[None], sums]).tolist()
        # The wrapper gave the mean over processes of sums over positions.
        to_mean = self._accelerator.num_processes / max(count, 1.0)
        norm_of_mean = raw_norm * to_mean
        clipping = min(1.0, self._clip / norm_of_mean) if norm_of_mean > 0 else 1.0
        return StepOutcome(loss, count, dict(zip(names, metrics, strict=True)), norm_of_mean), to_mean * clipping

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")
