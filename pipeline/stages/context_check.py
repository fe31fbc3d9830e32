"""Lengths that the target's context bounds, held against it before anything is built."""

from __future__ import annotations

from collections.abc import Callable

from deploy.formats.architectures import ModelShape

ReadShape = Callable[[], ModelShape]


def check_fits_context(key: str, num_tokens: int, read_shape: ReadShape, *, beside: int = 0) -> None:
    """Raises ValueError when `num_tokens`, with the `beside` that come before them, are more than the context holds.

    key: where the configuration has them. read_shape: () → the target's ModelShape.
    """
    context_length = read_shape().context_length
    if num_tokens + beside > context_length:
        before = f" behind a prompt of {beside} or more" if beside else ""
        raise ValueError(f"{key}={num_tokens}{before} exceeds the target's context of {context_length}; lower it")
