"""Whether CUDA can be used from here, and what the GPU is."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.runtime.devices import DeviceError, Driver

if TYPE_CHECKING:
    from deploy.runtime.gpu_model import Device

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first whose tensor cores multiply bfloat16."""
WORKING_BYTES = 2 << 30
"""Room for caches, logits and the row buffers of a prompt, beside the weights."""


@dataclass(frozen=True)
class Gpu:
    """name: as the driver tells. capability: of its instructions. total_bytes, free_bytes: memory."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


def check_gpu(driver: Driver, weight_bytes: int) -> None:
    """Raise DeviceError, naming numbers and remedy, unless torch and triton can run weights of that size here."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise DeviceError(
                f"{package} is not installed, which the GPU backend needs",
                "pip install -e '.[gpu]' in the project's directory, or use --device cpu",
            )
    needed = torch_cuda_version()
    if needed is None:
        raise DeviceError(
            "this torch is built for the CPU only", "install torch with CUDA (pip install torch), or use --device cpu"
        )
    if driver.cuda_version[0] < needed[0]:
        have, want = (".".join(map(str, version)) for version in (driver.cuda_version, needed))
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {have}, this torch needs CUDA {want}",
            f"update the driver, install a torch for CUDA {driver.cuda_version[0]}, or use --device cpu",
        )
    gpu = find_gpu()
    if gpu.capability < LEAST_CAPABILITY:
        have, want = (".".join(map(str, version)) for version in (gpu.capability, LEAST_CAPABILITY))
        raise DeviceError(f"{gpu.name} has compute capability {have}; the kernels need {want}")
    if gpu.free_bytes < weight_bytes + WORKING_BYTES:
        weights, working, free, total = (
            f"{size / 2**30:.1f} GiB" for size in (weight_bytes, WORKING_BYTES, gpu.free_bytes, gpu.total_bytes)
        )
        raise DeviceError(
            f"the bundle's models need {weights} and {working} to work in, {gpu.name} has {free} free of {total}",
            "end what else uses it, or use --device cpu",
        )


def torch_cuda_version() -> tuple[int, int] | None:
    """The CUDA version that torch was built for; None where it was built without."""
    import torch

    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def find_gpu() -> Gpu:
    """The current CUDA device. Raises DeviceError when CUDA does not start, with its own words."""
    import torch

    try:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"CUDA does not start ({error})") from error
    return Gpu(properties.name, (properties.major, properties.minor), total_bytes, free_bytes)


def device_facts() -> dict[str, Any]:
    """What of the GPU decides how long a forward takes, as plain JSON: part of the key of measured costs."""
    import torch
    import triton

    gpu = find_gpu()
    return {
        "gpu": gpu.name,
        "capability": ".".join(map(str, gpu.capability)),
        "memory_gib": round(gpu.total_bytes / 2**30),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def open_device() -> Device:
    """The current CUDA device, bfloat16, with Triton's kernels."""
    import torch

    from deploy.runtime.gpu_model import Device
    from deploy.runtime.gpu_ops import triton_ops

    return Device(torch.device("cuda"), torch.bfloat16, triton_ops(), device_facts())
