"""Which errors are the user's to mend, and how they read in one line.

The project's rule: what a user can get wrong raises ValueError (or FileNotFoundError) from our own code,
naming key, value and remedy. A ValueError out of numpy or torch is our bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from types import TracebackType

OWN_PACKAGES = frozenset({"pipeline", "compress", "train", "deploy"})
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})


class StoreError(ValueError):
    """The artifact store cannot be used as configured: not writable, full, or changed under our feet."""


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a disk is full; native libraries say so only in their message."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return "No space left on device" in str(error)


def is_not_writable(error: BaseException) -> bool:
    """Whether `error` is about permission, a read-only file system or a file where a directory should be."""
    return isinstance(error, OSError) and error.errno in NOT_WRITABLE


def is_user_error(error: BaseException) -> bool:
    """Whether one line tells the user all there is to know: bad input, full disk, missing permission."""
    if is_disk_full(error) or is_not_writable(error):
        return True
    return isinstance(error, ValueError | FileNotFoundError) and _raised_by_us(error.__traceback__)


def one_line(error: BaseException) -> str:
    """`error` as the line a user reads."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        path = f": {error.filename}" if error.filename else ""
        remedy = "free some space" if is_disk_full(error) else "choose another path, or change its permissions"
        return f"{error.strerror or error}{path}; {remedy}"
    return str(error) or type(error).__name__


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the innermost frame of `trace` belongs to one of this project's packages."""
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in OWN_PACKAGES
