"""Which backend computes, and what is said where a GPU cannot be used; the machine is made up."""

import logging
import sys
from dataclasses import replace

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime import devices
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.devices import DeviceError, Driver, bundle_bytes, choose_backend, find_driver
from deploy.runtime.session import Session

GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a usable H100; a test changes what it needs otherwise."""
    gpu_device = pytest.importorskip("deploy.runtime.gpu_device")

    class Machine:
        driver = Driver((12, 8), 1)
        torch_cuda = (12, 6)
        name, capability, total, free = "NVIDIA H100", (9, 0), 80 * GIB, 78 * GIB

    monkeypatch.setattr(devices, "find_driver", lambda: Machine.driver)
    monkeypatch.setattr(gpu_device, "torch_cuda_version", lambda: Machine.torch_cuda)
    found = gpu_device.Gpu
    monkeypatch.setattr(
        gpu_device, "find_gpu", lambda: found(Machine.name, Machine.capability, Machine.total, Machine.free)
    )
    return Machine


def test_auto_takes_a_gpu_that_can_be_used(gpu):
    assert choose_backend("auto", 5 * GIB) == choose_backend("gpu", 5 * GIB) == "gpu"


def test_what_is_named_is_taken(gpu):
    for name in ("cpu", "reference-int8", "reference-bf16"):
        assert choose_backend(name, GIB) == name
    with pytest.raises(ValueError, match="backend='gpu9' is not known; use cpu, gpu, reference-int8, reference-bf16"):
        choose_backend("gpu9", GIB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": None}, r"no NVIDIA driver \(libcuda.so.1 does not load\)"),
        ({"driver": Driver((12, 8), 0)}, "sees no GPU .*CUDA_VISIBLE_DEVICES"),
        ({"driver": Driver((11, 4), 1)}, r"supports CUDA 11\.4, this torch needs CUDA 12\.6; update the driver"),
        ({"torch_cuda": None}, "torch is built for the CPU only; install torch with CUDA"),
        ({"capability": (7, 5)}, r"H100 has compute capability 7\.5; the kernels need 8\.0"),
        ({"free": 6 * GIB}, r"need 5\.0 GiB and 2\.0 GiB to work in, NVIDIA H100 has 6\.0 GiB free of 80\.0 GiB"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_gpu_that_cannot_be_used_is_refused_and_passed_over(gpu, changes, message, caplog):
    for name, value in changes.items():
        setattr(gpu, name, value)
    with pytest.raises(DeviceError, match=message) as error:
        choose_backend("gpu", 5 * GIB)
    assert "--device cpu" in str(error.value)
    with caplog.at_level(logging.INFO, logger=devices.__name__):
        assert choose_backend("auto", 5 * GIB) == "cpu"
    (record,) = [record for record in caplog.records if record.name == devices.__name__]
    is_there = gpu.driver is not None and gpu.driver.num_devices > 0
    said = str(error.value) if is_there else error.value.problem
    assert "--device" not in error.value.problem
    assert record.getMessage() == f"computing on the CPU: {said}"
    assert record.levelno == (logging.WARNING if is_there else logging.INFO)


def test_a_missing_package_is_named(gpu, monkeypatch):
    from deploy.runtime import gpu_device

    monkeypatch.setattr(gpu_device.importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    with pytest.raises(DeviceError, match=r"triton is not installed.*pip install -e '.\[gpu\]'"):
        choose_backend("gpu", GIB)


@pytest.mark.parametrize(
    "error", [OSError("libcudart.so.13: cannot open shared object file"), ImportError("no module")]
)
def test_a_torch_that_cannot_be_imported_is_passed_over(gpu, monkeypatch, error):
    from deploy.runtime import gpu_device

    def fail():
        raise error

    monkeypatch.setattr(gpu_device, "torch_cuda_version", fail)
    assert choose_backend("auto", GIB) == "cpu"
    with pytest.raises(DeviceError, match=r"torch, which the GPU needs, cannot be imported \(.*; use --device cpu"):
        choose_backend("gpu", GIB)


def test_a_twin_for_other_programs_needs_no_memory_here(tiny, tmp_path):
    bundle = Bundle.open(tiny.bundle_with_head(tmp_path / "b"))
    before = bundle_bytes(bundle)
    target = bundle.component("target")
    twin = replace(target, role="target-w4a16")
    manifest = replace(bundle.manifest, components=(*bundle.manifest.components, twin))
    assert bundle_bytes(replace(bundle, manifest=manifest)) == before


def test_without_a_driver_nothing_looks_for_torch(monkeypatch):
    monkeypatch.setattr(devices, "find_driver", lambda: None)
    monkeypatch.setitem(sys.modules, "deploy.runtime.gpu_device", None)  # importing it would fail
    assert choose_backend("auto", GIB) == "cpu"


def test_a_driver_that_does_not_load_is_none(monkeypatch):
    monkeypatch.setattr(devices, "_CUDA_LIBRARY", "libnone.so.7")
    assert find_driver() is None


def test_a_session_by_auto_is_the_cpus_where_there_is_no_gpu(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(devices, "find_driver", lambda: None)
    bundle = Bundle.open(tiny.bundle_with_head(tmp_path / "b"))
    sizes = [file.stat().st_size for role in ("target", "eagle-target") for file in (bundle.path / role).iterdir()]
    assert bundle_bytes(bundle) == sum(sizes)
    assert isinstance(Session.open(bundle, backend="auto").backend, CpuBackend)
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        Session.open(bundle, backend="gpu")
