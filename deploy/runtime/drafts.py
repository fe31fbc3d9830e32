"""What every model that drafts asks of a draft before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.runtime.tree import TreeLimits

Float32 = npt.NDArray[np.float32]


def fit_draft(
    tokens: Sequence[int],
    features: Float32 | None,
    limits: TreeLimits,
    *,
    shape: ModelShape,
    num_features: int,
    length: int,
) -> TreeLimits:
    """`limits` with no more levels than the context has room for.

    shape: of the model that drafts. num_features: states that its rows read, 0 for a language model. length: rows in
    the sequence's cache. Raises ValueError for tokens or features that do not fit.
    """
    if not tokens:
        raise ValueError("a draft needs at least one token to follow")
    for index, token in enumerate(tokens):
        if not 0 <= token < shape.vocab_size:
            raise ValueError(f"tokens[{index}]={token} is not in the vocabulary of {shape.vocab_size}")
    expected = (len(tokens), num_features * shape.hidden_size) if num_features else None
    found = None if features is None else features.shape
    if found != expected or (features is not None and features.dtype != np.float32):
        described = "None" if features is None else f"{features.dtype} {list(features.shape)}"
        raise ValueError(f"features are {described}, expected {f'float32 {list(expected)}' if expected else None}")
    room = shape.context_length - length - len(tokens)
    if room < 0:
        raise ValueError(f"{length} + {len(tokens)} tokens exceed the context of {shape.context_length}")
    return limits if limits.depth <= room + 1 else replace(limits, depth=room + 1)
