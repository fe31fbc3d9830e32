"""What training asks of the target: its hidden states on given texts, as it is served.

The implementations lie where the target runs: the pipeline wraps the bundle's runtime, `train.torch_features` a
transformers model.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class FeatureSource(Protocol):
    """Hidden states of the target."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Which states: i is what enters decoder layer i, the number of layers is what enters the final norm."""
        ...

    def capture(self, sequences: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.float32]]:
        """sequences: token ids [n] each. Returns float32 [n, len(layers), hidden] for each, layers in their order."""
        ...
