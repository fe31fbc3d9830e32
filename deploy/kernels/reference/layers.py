"""A decoder layer of docs/numerics.md in numpy: what a language model has many of, and an EAGLE head has one of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deploy.formats.activations import LayerInputs
from deploy.formats.architectures import ModelShape
from deploy.formats.packed import GroupedInt
from deploy.kernels.reference.attention import attend, rotate
from deploy.kernels.reference.cache import SequenceCache
from deploy.kernels.reference.fp32 import LANES, Float32, lane_dot, round_half, silu32
from deploy.kernels.reference.linear import GROUP, FloatLinear, Int8Linear, Linear
from deploy.kernels.reference.row_scales import RowScaledLinear
from deploy.kernels.rope import rope_tables
from deploy.runtime.backend import Row

# float32 rounds nothing; it exists to compare with other implementations.
Activations = Literal["int8", "bf16", "float32"]
ROWS_AT_ONCE = 64


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """(x · 1/sqrt(mean(x²) + eps)) · weight over the last axis; the sum of squares in 16 lanes."""
    mean = lane_dot(x, x) / np.float32(x.shape[-1])
    factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return (x * factor[..., None]) * weight


@dataclass(frozen=True)
class DecoderLayer:
    """input_norm: applied by who computes what q, k and v read."""

    input_norm: Float32
    q: Linear
    k: Linear
    v: Linear
    q_norm: Float32 | None
    k_norm: Float32 | None
    o: Linear
    post_attention_norm: Float32
    gate: Linear
    up: Linear
    down: Linear


def build_head_linear(weight: Float32, activations: Activations) -> Linear:
    """A matrix of an EAGLE head: as of `build_linear`, but in 4 bits."""
    return Int8Linear.from_float4(weight) if activations == "int8" else build_linear(weight, None, activations)


def build_linear(
    weight: GroupedInt | Float32, bias: Float32 | None, activations: Activations, inputs: LayerInputs | None = None
) -> Linear:
    """A linear layer for one activation type; where its file says how inputs are quantized, the same one for all."""
    if inputs is not None:
        assert isinstance(weight, GroupedInt)
        return RowScaledLinear(weight, inputs, bias)
    if activations == "int8":
        if isinstance(weight, GroupedInt):
            return Int8Linear.from_grouped(weight, bias)
        return Int8Linear.from_float(weight, bias)
    values = weight.dequantize() if isinstance(weight, GroupedInt) else weight
    return FloatLinear(values, bias, is_rounded=activations == "bf16")


def check_shape(shape: ModelShape) -> None:
    """The sums of docs/numerics.md need whole groups and lanes."""
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    sizes["num_heads·head_dim"] = shape.num_heads * shape.head_dim
    for key, size in sizes.items():
        if size % GROUP:
            raise ValueError(f"{key}={size} is not a multiple of {GROUP}; such models are not supported")
    if shape.head_dim % LANES:
        raise ValueError(f"head_dim={shape.head_dim} is not a multiple of {LANES}; such models are not supported")


def _attention(
    shape: ModelShape,
    index: int,
    layer: DecoderLayer,
    h: Float32,
    rows: Mapping[int, Row],
    caches: Mapping[int, SequenceCache],
) -> Float32:
    """Attention of layer `index`, without its output projection; fills the caches of these rows.

    h: what q, k and v read, [len(rows), …]. rows: those to compute by their index in the call.
    """
    count = len(rows)
    tables = rope_tables(shape, np.array([row.position for row in rows.values()]))
    q = layer.q(h).reshape(count, shape.num_heads, shape.head_dim)
    k = layer.k(h).reshape(count, shape.num_kv_heads, shape.head_dim)
    v = layer.v(h).reshape(count, shape.num_kv_heads, shape.head_dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = rms_norm(q, layer.q_norm, shape.rms_norm_eps)
        k = rms_norm(k, layer.k_norm, shape.rms_norm_eps)
    q, k = rotate(q, *tables), rotate(k, *tables)
    output = np.empty((count, shape.num_heads * shape.head_dim), dtype=np.float32)
    indices, of_row = list(rows), np.array([row.sequence for row in rows.values()])
    for sequence in np.unique(of_row):
        cache, mine = caches[int(sequence)], np.flatnonzero(of_row == sequence)
        own = [cache.paths[indices[i]] for i in mine]
        slots = [path[-1] for path in own]
        cache.keys[index, slots], cache.values[index, slots] = round_half(k[mine]), round_half(v[mine])
        lengths = np.array([len(path) for path in own])
        paths = np.zeros((len(own), int(lengths.max())), dtype=np.int64)
        for i, path in enumerate(own):
            paths[i, : len(path)] = path
        output[mine] = attend(q[mine], cache.keys[index], cache.values[index], paths, lengths)
    return output


def run_layer(
    shape: ModelShape,
    index: int,
    layer: DecoderLayer,
    x: Float32,
    h: Float32,
    rows: Mapping[int, Row],
    caches: Mapping[int, SequenceCache],
) -> Float32:
    """The residual stream behind the layer; x: before it, [len(rows), hidden]. Other arguments as of `_attention`."""
    x = x + layer.o(_attention(shape, index, layer, h, rows, caches))
    h = rms_norm(x, layer.post_attention_norm, shape.rms_norm_eps)
    return x + layer.down(silu32(layer.gate(h)) * layer.up(h))
