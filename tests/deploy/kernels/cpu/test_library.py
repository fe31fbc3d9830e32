"""Elementwise functions, choice of instruction set, number of threads."""

import numpy as np
import pytest

from deploy.kernels.cpu import library
from deploy.kernels.cpu.library import (
    ISAS,
    choose_isa,
    describe_choice,
    library_path,
    load_library,
    supported_isas,
)
from deploy.kernels.cpu.threads import cgroup_quota, choose_threads
from deploy.kernels.reference.fp32 import exp32, round_half


def test_exp_is_the_definitions(runtime):
    rng = np.random.default_rng(0)
    edges = np.array([0, -0.0, -87.3, -87.30001, -88, 88, 88.00001, 1e30, -1e30, -np.inf, np.inf, 1e-40], np.float32)
    wide, narrow = rng.uniform(-90, 90, 50_000), rng.standard_normal(7)
    x = np.concatenate([edges, wide.astype(np.float32), narrow.astype(np.float32)])
    np.testing.assert_array_equal(runtime.exp(x), exp32(x))


def test_halves_are_rounded_like_numpys(runtime):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = every[np.isfinite(every)].astype(np.float32)
    rng = np.random.default_rng(1)
    between = np.nextafter(exact, rng.choice([np.float32(-np.inf), np.float32(np.inf)], exact.shape))
    middle = (exact[:-1] + exact[1:]) / np.float32(2)
    beyond = np.array([65504, 65519.99, 65520, 1e30, -65520, np.inf, 2**-25, 2**-24, 1.5 * 2**-24, 1e-40], np.float32)
    x = np.concatenate([exact, between, middle, beyond])
    x = np.resize(x, -(-x.size // 16) * 16)
    np.testing.assert_array_equal(runtime.to_half(x).view(np.uint16), round_half(x).view(np.uint16))


def test_scalar_is_supported_everywhere_and_the_best_is_the_default(monkeypatch):
    monkeypatch.delenv("UNDERSTUDY_ISA", raising=False)
    assert supported_isas()[-1] == "scalar"
    assert choose_isa() == supported_isas()[0]


def test_the_variable_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_ISA", "scalar")
    assert choose_isa() == "scalar"
    monkeypatch.setenv("UNDERSTUDY_ISA", "sse9")
    with pytest.raises(ValueError, match=f"'sse9' is unknown; use {', '.join(ISAS)}"):
        choose_isa()


def test_an_instruction_set_that_the_machine_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr(library, "supported_isas", lambda: ("scalar",))
    monkeypatch.setenv("UNDERSTUDY_ISA", "avx2")
    with pytest.raises(ValueError, match="not supported by this machine; use scalar"):
        choose_isa()


def test_a_machine_with_less_gets_the_next_best(monkeypatch):
    """What each machine can run is asked of the processor; a lesser one is imitated here."""
    monkeypatch.delenv("UNDERSTUDY_ISA", raising=False)
    monkeypatch.setenv("UNDERSTUDY_THREADS", "1")
    for count in range(1, len(ISAS) + 1):
        monkeypatch.setattr(library, "supported_isas", lambda count=count: ISAS[-count:])
        assert choose_isa() == ISAS[-count]
        others = f"; also: {', '.join(ISAS[len(ISAS) - count + 1 :])}" if count > 1 else ""
        assert describe_choice() == f"{ISAS[-count]}, 1 thread{others}"


def test_another_library_file_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("UNDERSTUDY_CPU_LIBRARY", str(tmp_path / "other.so"))
    assert library_path() == tmp_path / "other.so"
    with pytest.raises(OSError, match=r"other\.so: .*missing, which UNDERSTUDY_CPU_LIBRARY names"):
        load_library(library_path())
    (tmp_path / "other.so").write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"other\.so"):
        load_library(library_path())
    monkeypatch.delenv("UNDERSTUDY_CPU_LIBRARY")
    assert library_path().parent.name == "cpu"
    with pytest.raises(OSError, match=r"make install"):
        load_library(tmp_path / "none.so")


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(library, "_ABI_VERSION", 999)
    with pytest.raises(OSError, match="another version of the source; install"):
        load_library(library_path())


def test_the_number_of_threads_comes_from_argument_variable_or_affinity(monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_THREADS", "5")
    assert choose_threads(3) == 3
    assert choose_threads() == 5
    monkeypatch.setenv("UNDERSTUDY_THREADS", "many")
    with pytest.raises(ValueError, match="UNDERSTUDY_THREADS='many'"):
        choose_threads()
    monkeypatch.delenv("UNDERSTUDY_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})
    assert choose_threads() == 1
    with pytest.raises(ValueError, match="threads=0"):
        choose_threads(0)


@pytest.mark.parametrize(("version", "expected"), [(2, 1.5), (1, 0.5)])
def test_a_control_groups_quota_counts(tmp_path, version, expected):
    membership = tmp_path / "cgroup"
    if version == 2:
        group = tmp_path / "a" / "b"
        group.mkdir(parents=True)
        (group / "cpu.max").write_text("max 100000\n")
        (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
        membership.write_text("0::/a/b\n")
    else:
        group = tmp_path / "cpu" / "a"
        group.mkdir(parents=True)
        (group / "cpu.cfs_quota_us").write_text("50000\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
        membership.write_text("3:cpu,cpuacct:/a\n2:memory:/a\n0::/\n")
    assert cgroup_quota(tmp_path, membership) == expected


def test_without_a_control_group_there_is_no_quota(tmp_path):
    assert cgroup_quota(tmp_path, tmp_path / "none") is None
