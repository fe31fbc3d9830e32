"""Where a run stands, and what it ends with."""

from dataclasses import asdict, dataclass, field
from typing import Any

from train.loop.batches import Position


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics after `step` optimizer steps on `tokens` tokens in `elapsed_seconds` of training."""

    step: int
    tokens: int
    elapsed_seconds: float
    metrics: dict[str, float]

    @property
    def tau(self) -> float:
        """Acceptance length, by which checkpoints are chosen."""
        return self.metrics["tau"]


@dataclass
class TrainState:
    """Position and history of a run; every process holds the same.

    step: optimizer steps, skipped ones included. position: in the stream of batches. tokens: trained on, all processes
    together. elapsed_seconds: of training, as the main process measures them, over all resumed runs, without
    `evaluation_seconds` and without checkpoints. skipped_steps: those with a non-finite loss or gradient.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    elapsed_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    skipped_steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        """The evaluation with the highest tau; of equal ones the earliest."""
        return max(self.evaluations, key=lambda evaluation: evaluation.tau)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back exactly."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "TrainState":
        """Inverse of `to_json`."""
        position = Position(**values["position"])
        evaluations = [Evaluation(**evaluation) for evaluation in values["evaluations"]]
        return TrainState(**{**values, "position": position, "evaluations": evaluations})


@dataclass(frozen=True)
class TrainResult:
    """How a finished run went; the task's model then holds the parameters of the best evaluation.

    epochs: passes over the data, a fraction included. precision: fp32 or bf16, as resolved. num_sequences, num_learned:
    of the data, sequences that were not left out, and their tokens that are learned from. The other values as in
    `TrainState`.
    """

    steps: int
    tokens: int
    epochs: float
    elapsed_seconds: float
    evaluation_seconds: float
    skipped_steps: int
    precision: str
    num_processes: int
    num_sequences: int
    num_learned: int
    best: Evaluation
    evaluations: tuple[Evaluation, ...]
