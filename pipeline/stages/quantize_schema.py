"""Structured configs of quantize: `conf/quantize/`, one for each method."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Observer(Enum):
    """How a group's range is found: its extremes, or the range with the least squared error (plain or weighted)."""

    minmax = "minmax"
    mse = "mse"
    imatrix_mse = "imatrix_mse"


class OnSingular(Enum):
    """What happens to a layer whose Hessian cannot be inverted."""

    error = "error"
    rtn = "rtn"


@dataclass
class GptqConfig:
    """`conf/quantize/gptq.yaml`. dampening: fraction of the Hessian's mean diagonal added to it.

    calibration: groups of samples to use (chat, free, prose, code, text); null takes all that calibrate made.
    num_samples: how many of them, the groups in turn; null takes all.
    """

    method: str = "gptq"
    bits: int = MISSING
    group_size: int = MISSING
    symmetric: bool = MISSING
    observer: Observer = MISSING
    dampening: float = MISSING
    activation_order: bool = MISSING
    on_singular: OnSingular = MISSING
    calibration: list[str] | None = None
    num_samples: int | None = None


@dataclass
class RtnConfig:
    """`conf/quantize/rtn.yaml`: round to nearest."""

    method: str = "rtn"
    bits: int = MISSING
    group_size: int = MISSING
    symmetric: bool = MISSING
    observer: Observer = MISSING


@dataclass
class KeepConfig:
    """`conf/quantize/keep.yaml`: a GGUF's own grid. twin: also write a standard W4A16 model for other engines."""

    method: str = "keep"
    twin: bool = MISSING


@dataclass
class Q4ZeroConfig:
    """`conf/quantize/q4_0.yaml`: llama.cpp's Q4_0, the peer."""

    method: str = "q4_0"


class Solver(Enum):
    """How codes are chosen: gptq, by error on calibrated inputs; rtn, to the nearest."""

    gptq = "gptq"
    rtn = "rtn"


class Criterion(Enum):
    """A layer gets 4 bits where its output error with 4 is below gamma (error), or gamma times that with 8 (ratio)."""

    ratio = "ratio"
    error = "error"


class Threshold(Enum):
    """mean: beta times the mean for every layer (the paper's). search: what loses least, below it with 4 bits and above
    it with 8."""

    mean = "mean"
    search = "search"


class Scope(Enum):
    """token: a scale for each row of inputs, found when it is computed; tensor: one for a layer, from calibration."""

    token = "token"
    tensor = "tensor"


@dataclass
class WeightsConfig:
    """Grid of the weights where inputs are quantized too. group_size: null for one scale per output channel."""

    bits: int = MISSING
    group_size: int | None = None
    symmetric: bool = MISSING
    observer: Observer = MISSING


@dataclass
class FlattenedWeightsConfig:
    """The same without bits, which each layer gets by its errors."""

    group_size: int | None = None
    symmetric: bool = MISSING
    observer: Observer = MISSING


@dataclass
class ActivationsConfig:
    """Grid of the inputs, always symmetric."""

    bits: int = MISSING
    scope: Scope = MISSING


@dataclass
class SmoothQuantConfig:
    """`conf/quantize/smoothquant.yaml`. alpha: strengths to choose from by KL; other keys as of GPTQ.

    twin: also write a standard W4A16 model for other engines.
    """

    method: str = "smoothquant"
    alpha: list[float] = MISSING
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    solver: Solver = MISSING
    dampening: float = MISSING
    activation_order: bool = MISSING
    on_singular: OnSingular = MISSING
    calibration: list[str] | None = None
    num_samples: int | None = None
    twin: bool = MISSING


@dataclass
class FlattenQuantConfig:
    """`conf/quantize/flattenquant.yaml`. alpha: strength of a smoothing before; null leaves it out.

    beta: threshold over the mean of ordinary channels' maxima. threshold: whether splits keep to that. max_expansion:
    columns over channels, before padding. criterion: by which layers get 4 bits, those with the least of it first:
    until int4_share of the linear layers' multiplications are in 4 bits, or those below gamma; the other is null.
    solver: rtn rounds the flattened weights to the nearest, and nothing below is used. correct_inputs: before GPTQ,
    4-bit layers' weights make up for what rounding takes from their inputs (GPTAQ's asymmetric calibration). Other keys
    as of SmoothQuant.
    """

    method: str = "flattenquant"
    alpha: float | None = None
    beta: float = MISSING
    threshold: Threshold = MISSING
    max_expansion: float = MISSING
    criterion: Criterion = MISSING
    int4_share: float | None = None
    gamma: float | None = None
    weights: FlattenedWeightsConfig = field(default_factory=FlattenedWeightsConfig)
    solver: Solver = MISSING
    correct_inputs: bool = MISSING
    dampening: float = MISSING
    activation_order: bool = MISSING
    on_singular: OnSingular = MISSING
    calibration: list[str] | None = None
    num_samples: int | None = None
    twin: bool = MISSING


METHODS = {
    "gptq": GptqConfig,
    "rtn": RtnConfig,
    "keep": KeepConfig,
    "q4_0": Q4ZeroConfig,
    "smoothquant": SmoothQuantConfig,
    "flattenquant": FlattenQuantConfig,
}
"""By the name of the method and of its file."""
