"""Which backend computes: what `--device` and `--backend` come to, decided once before any model is loaded.

Nothing here imports torch: a machine without NVIDIA's driver is told by the driver's absence alone.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from typing import Literal, get_args

from deploy.formats.bundle import Bundle
from deploy.formats.components import TWIN
from deploy.runtime.backends import BackendName

_logger = logging.getLogger(__name__)
DeviceName = Literal["auto", "cpu", "gpu"]
_CUDA_LIBRARY = "libcuda.so.1"


class DeviceError(ValueError):
    """A GPU that cannot be used. problem: what is wrong, with the numbers; the message adds the remedy."""

    def __init__(self, problem: str, remedy: str = "use --device cpu") -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver. cuda_version: the newest that it supports, as (major, minor). num_devices: that it sees."""

    cuda_version: tuple[int, int]
    num_devices: int


def find_driver() -> Driver | None:
    """The driver of this machine; None where there is none."""
    try:
        library = ctypes.CDLL(_CUDA_LIBRARY)
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    is_ready = library.cuInit(0) == 0
    if not is_ready or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        count.value = 0
    return Driver((version.value // 1000, version.value % 1000 // 10), count.value)


def require_backend(name: str) -> BackendName:
    """`name` as a backend. Raises ValueError for an unknown one."""
    for known in get_args(BackendName):
        if known == name:
            return known
    raise ValueError(f"backend={name!r} is not known; use {', '.join(get_args(BackendName))}")


def bundle_bytes(bundle: Bundle) -> int:
    """Bytes of the models that the runtime reads, as their files have them; packed on a device about as many."""
    return sum(component.num_bytes for component in bundle.manifest.components if component.role != TWIN)


def choose_backend(name: BackendName | DeviceName, weight_bytes: int) -> BackendName:
    """The backend `name`, or where that is "auto" the GPU if it can be used, else the CPU.

    weight_bytes: of all models that are to run beside each other. Raises DeviceError for "gpu" where it cannot be
    used. "auto" then takes the CPU and says why in one line, a warning where there is a GPU that is passed over.
    """
    if name not in ("auto", "gpu"):
        return require_backend(name)
    driver = find_driver()
    try:
        _check_gpu(driver, weight_bytes)
    except DeviceError as error:
        if name == "gpu":
            raise
        if driver is not None and driver.num_devices:
            _logger.warning("computing on the CPU: %s", error)
        else:
            _logger.info("computing on the CPU: %s", error.problem)  # nothing to remedy
        return "cpu"
    return "gpu"


def _check_gpu(driver: Driver | None, weight_bytes: int) -> None:
    if driver is None:
        raise DeviceError(f"there is no NVIDIA driver ({_CUDA_LIBRARY} does not load)")
    if not driver.num_devices:
        raise DeviceError("the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES hides them?)")
    try:
        from deploy.runtime.gpu_device import check_gpu

        check_gpu(driver, weight_bytes)
    except (ImportError, OSError) as error:  # OSError: a CUDA library that does not load
        raise DeviceError(f"torch, which the GPU needs, cannot be imported ({error})") from error
