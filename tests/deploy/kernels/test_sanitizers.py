"""The native tests once more, on libraries built with sanitizers: memory and undefined behaviour, then data races."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NATIVE = (
    "tests/deploy/kernels/cpu",
    "tests/deploy/runtime/test_backend.py",
    "tests/deploy/runtime/test_loading.py",
    "tests/deploy/runtime/test_cpu_backend.py",
    "tests/deploy/runtime/test_cpu_eagle.py",
    "tests/deploy/runtime/test_eagle.py",
    "tests/deploy/runtime/test_cpu_row_scales.py",
    "tests/deploy/runtime/test_draft.py",
)
HOSTILE = ("tests/deploy/runtime/test_hostile_bundles.py",)
FAULTS = ("AddressSanitizer:", "ThreadSanitizer:", "runtime error:")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Sanitized:
    """A sanitized library, and what a process needs to load it."""

    environment: dict[str, str]

    def run(self, *arguments, **more):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.environment, **more},
            capture_output=True,
            text=True,
        )

    def test(self, *arguments, **more):
        """Run pytest on it; fails with its output when a test or a sanitizer does."""
        done = self.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, **more)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-10_000:]
        assert not [fault for fault in FAULTS if fault in output], output[-10_000:]
        assert " passed" in output


def find(program):
    """Its path: beside Python, where the extra `test` installs it, or where the shell would find it."""
    return shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def sanitized(build, names, options, variables):
    """Build the library, which takes minutes: every instruction set, instrumented. Skips where that cannot be done.

    names: the sanitizers' own libraries, which must be loaded before Python is.
    """
    compiler, cmake, ninja = (find(program) for program in ("g++", "cmake", "ninja"))
    for program, path in (("g++", compiler), ("cmake", cmake), ("ninja", ninja)):
        if path is None:
            pytest.skip(f"{program} is not installed")
    preload = []
    for name in names:
        command = [compiler, f"-print-file-name={name}"]
        found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not found.is_absolute():
            pytest.skip(f"{name} is not installed beside g++")
        preload.append(str(found.resolve()))
    environment = {"LD_PRELOAD": ":".join(preload), **variables}
    probe = Sanitized(environment).run("-c", "pass")
    if probe.returncode:
        pytest.skip(f"Python does not start under {names[0]}: {probe.stderr.strip()[-300:]}")
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Sanitized({**environment, "UNDERSTUDY_CPU_LIBRARY": str(build / "libunderstudy_cpu.so")})


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """AddressSanitizer and UndefinedBehaviorSanitizer. Leaks are not looked for: Python frees little when it ends."""
    variables = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    names, options = ("libasan.so", "libubsan.so"), ["-DUNDERSTUDY_SANITIZE=ON"]
    return sanitized(tmp_path_factory.mktemp("address"), names, options, variables)


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    """ThreadSanitizer, over our threads alone: it cannot see how numpy's OpenBLAS, which is not instrumented, waits."""
    flags = "-fsanitize=thread -g"
    options = [f"-DCMAKE_CXX_FLAGS={flags}", f"-DCMAKE_SHARED_LINKER_FLAGS={flags}"]
    variables = {"TSAN_OPTIONS": "exitcode=66", "OPENBLAS_NUM_THREADS": "1"}
    return sanitized(tmp_path_factory.mktemp("thread"), ("libtsan.so",), options, variables)


def test_native_code_has_no_memory_errors_and_no_undefined_behaviour(memory):
    memory.test(*NATIVE, "-k", "not gpu")


def test_hostile_bundles_cause_no_memory_errors(memory):
    """Integer sums over activations that are not numbers may overflow; what they give is refused at the logits."""
    suppressions = Path(__file__).with_name("ubsan.txt")
    options = f"{memory.environment['UBSAN_OPTIONS']}:suppressions={suppressions}"
    memory.test(*HOSTILE, UBSAN_OPTIONS=options)


def test_a_memory_error_would_be_found(memory):
    """A read behind an array's end, which the plain library would not notice."""
    program = (
        "import ctypes, numpy as np\n"
        "from deploy.kernels.cpu.library import Runtime, native\n"
        "runtime, y = Runtime(threads=1), np.empty(1 << 16, dtype=np.float32)\n"
        "allocate = ctypes.CDLL(None).malloc\n"
        "allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "native().us_exp(runtime.handle, allocate(64), 1 << 16, y.ctypes.data)\n"
    )
    done = memory.run("-c", program)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_the_pools_threads_do_not_race(races):
    races.test(*NATIVE, "-k", "(threads or tree or sequences or sizes or chunks or pass or pieces) and not gpu")
