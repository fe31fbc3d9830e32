"""`CpuEagle`: an EAGLE-3 head in native code, which drafts from the states of another model."""

from __future__ import annotations

from deploy.formats.speculators import EagleDirectory
from deploy.kernels.cpu.library import shared_runtime
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.cpu_loader import load_eagle
from deploy.runtime.cpu_model import CpuModel


class CpuEagle(CpuModel):
    """DraftModel (see deploy/runtime/drafters/base.py): the same bits as ReferenceEagle's `int8` form.

    target: whose embedding it reads, unless the head has a copy. threads: by default the target's. Raises ValueError
    for a head that does not fit the target.
    """

    def __init__(self, head: EagleDirectory, target: CpuBackend, threads: int | None = None) -> None:
        head.config.check_target(target.shape)
        runtime = target.runtime if threads is None else shared_runtime(threads)
        self._target = target  # its memory holds the embedding
        self._feature_layers = head.config.feature_layers
        loaded = load_eagle(head, runtime, target.handle)
        super().__init__(loaded, head.config.layer, runtime, len(self._feature_layers))

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the target whose states its rows read."""
        return self._feature_layers
