"""The backends by name."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from deploy.formats.model_dir import ModelDirectory
from deploy.formats.speculators import EagleDirectory
from deploy.runtime.backend import Backend
from deploy.runtime.drafters.base import DraftModel

BackendName = Literal["cpu", "gpu", "reference-int8", "reference-bf16"]


def open_backend(
    name: BackendName,
    directory: ModelDirectory,
    *,
    threads: int | None = None,
    head_ids: npt.NDArray[np.int64] | None = None,
) -> Backend:
    """The model on the backend called `name`: native code, kernels on the GPU, or the slow definitions in numpy.

    threads: for "cpu"; None takes what the process may use. head_ids: of a model that drafts, the tokens that it may
    draft, ascending; a reference, which has no time to save, drafts from all of them. Raises ValueError for an unknown
    name and for what the backend does not support. Whether the GPU can be used is asked before, by
    deploy/runtime/devices.py.
    """
    if name == "cpu":
        from deploy.runtime.cpu_backend import CpuBackend

        return CpuBackend(directory, threads=threads, head_ids=head_ids)
    if name == "gpu":
        from deploy.runtime.gpu_backend import GpuBackend
        from deploy.runtime.gpu_device import open_device

        return GpuBackend.open(directory, open_device(), head_ids=head_ids)
    if name == "reference-int8" or name == "reference-bf16":
        from deploy.kernels.reference.model import ReferenceBackend

        return ReferenceBackend(directory, activations="int8" if name == "reference-int8" else "bf16")
    raise ValueError(f"backend={name!r} is not known; use {', '.join(get_args(BackendName))}")


def open_head(head: EagleDirectory, above: Backend, *, threads: int | None = None) -> DraftModel:
    """An EAGLE head on the backend of the model that it drafts for. Raises ValueError where there is none for it."""
    from deploy.kernels.reference.model import ReferenceBackend
    from deploy.runtime.cpu_backend import CpuBackend

    if isinstance(above, CpuBackend):
        from deploy.runtime.cpu_eagle import CpuEagle

        return CpuEagle(head, above, threads=threads)
    if isinstance(above, ReferenceBackend):
        from deploy.kernels.reference.eagle import ReferenceEagle

        return ReferenceEagle(head, above)
    from deploy.runtime.gpu_backend import GpuBackend  # torch is loaded where it has been loaded before

    if isinstance(above, GpuBackend):
        from deploy.runtime.gpu_eagle import GpuEagle

        return GpuEagle.open(head, above)
    raise ValueError(f"no EAGLE head runs on a {type(above).__name__}")
