"""Memory of a build: its peak, and freed blocks that are used again instead of being mapped anew."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType

import psutil

INTERVAL_SECONDS = 0.25
MALLOC_PARAMETERS = {
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 64 << 20),
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
}
"""Of glibc's mallopt(3): number and value. Up to 2 GiB stay with the process; blocks from 1 GiB on go back at once."""


def keep_freed_memory() -> None:
    """Make glibc's malloc use freed blocks again that it would otherwise give back to the system.

    It maps every block of more than 32 MiB for itself, so each temporary tensor of a large layer is paid for in page
    faults: they were half the time of choosing weight ranges for 8960 × 1536 (`quantize.weights.observer=mse`). Does
    nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for number, value in MALLOC_PARAMETERS.values():
            mallopt(number, value)


class MemoryWatch:
    """Context manager whose `peak_bytes` is the largest resident sum of the process tree seen so far.

    Sampled, so a shorter spike may be missed; pages shared between processes count once per process.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        total = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:  # ended between listing and reading
                continue
        self.peak_bytes = max(self.peak_bytes, total)
