"""Training metrics averaged over a few steps."""

from train.loop.state import TrainState
from train.loop.step import StepOutcome


class LogWindow:
    """Sums over the steps since the last row; skipped steps count as time and tokens only."""

    def __init__(self, state: TrainState) -> None:
        self._begin(state)

    def add(self, outcome: StepOutcome) -> None:
        """Count one step."""
        if outcome.is_finite:
            for name, value in {"loss": outcome.loss, **outcome.metrics}.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._count += outcome.count

    def row(self, state: TrainState, outcome: StepOutcome, learning_rate: float) -> dict[str, float]:
        """The metrics of the window that ends here, and a new window. Means are per counted position."""
        seconds = max(state.elapsed_seconds - self._seconds, 1e-9)
        row = {name: value / max(self._count, 1.0) for name, value in self._sums.items()}
        row |= {
            "learning_rate": learning_rate,
            "gradient_norm": outcome.gradient_norm,
            "tokens": float(state.tokens),
            "tokens_per_second": (state.tokens - self._tokens) / seconds,
            "elapsed_seconds": state.elapsed_seconds,
            "skipped_steps": float(state.skipped_steps),
        }
        self._begin(state)
        return row

    def _begin(self, state: TrainState) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0.0
        self._tokens, self._seconds = state.tokens, state.elapsed_seconds
