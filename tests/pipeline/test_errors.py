"""Which errors are the user's."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.errors import StoreError, is_user_error, one_line
from pipeline.manifest import Manifest


def caught(function: Callable[..., object], *args: object) -> BaseException:
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_value_error_of_ours_is_the_users() -> None:
    assert is_user_error(caught(Manifest.from_json, '{"format": 2}'))
    assert is_user_error(StoreError("store=x: no"))


def test_a_value_error_out_of_a_library_is_a_bug() -> None:
    assert not is_user_error(caught(lambda: np.zeros(3).reshape(2, 2)))
    assert not is_user_error(caught(lambda: {}["x"]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_disks_that_refuse_are_the_users(code: int) -> None:
    error = OSError(code, "refused", "/some/where")
    assert is_user_error(error)
    assert one_line(error).startswith("refused: /some/where; ")


def test_a_full_disk_is_recognised_in_a_native_librarys_words() -> None:
    assert is_user_error(RuntimeError("I/O error: No space left on device (os error 28)"))
