"""The decoder layers on the device: docs/numerics.md's `bf16` form, as operations of `Ops`.

The residual stream is fp32; what linear layers read is 16 bit, or fp32 where they quantize it, and what they add to the
stream fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deploy.formats.architectures import ModelShape
from deploy.kernels.gpu import attention, rms_norm
from deploy.runtime.gpu_cache import SlotCache
from deploy.runtime.gpu_inputs import RowInputs
from deploy.runtime.gpu_ops import Ops
from deploy.runtime.gpu_weights import Layer, input_type


def check_shape(shape: ModelShape) -> None:
    """Raise ValueError, before anything is loaded, for sizes that the kernels do not know."""
    for key, size, largest in (
        ("head_dim", shape.head_dim, max(attention.CONFIGS)),
        ("hidden_size", shape.hidden_size, max(rms_norm.CONFIGS)),
    ):
        if size > largest:
            raise ValueError(f"{key}={size} is larger than the {largest} that the GPU kernels know; use --device cpu")


@dataclass(frozen=True)
class Context:
    """What all layers share. cosine, sine: fp32 [context, head_dim / 2].

    dtype: of what linear layers read that do not quantize it.
    """

    ops: Ops
    shape: ModelShape
    cache: SlotCache
    cosine: Tensor
    sine: Tensor
    dtype: torch.dtype


@dataclass
class Stream:
    """The residual stream fp32 [rows, hidden], and what the last layer adds to it, which the next norm does.

    taps: layer → a copy of what enters it.
    """

    residual: Tensor
    delta: Tensor | None = None
    taps: dict[int, Tensor] = field(default_factory=dict)

    def norm(self, context: Context, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Brings the stream up to date; its RMSNorm, [rows, hidden] in `dtype`."""
        ops, eps = context.ops, context.shape.rms_norm_eps
        if self.delta is None:
            return ops.rms_norm(self.residual, weight, eps, dtype)
        normed = ops.add_rms_norm(self.residual, self.delta, weight, eps, dtype)
        self.delta = None
        return normed

    def tap(self, index: int, wanted: Sequence[int]) -> None:
        if index in wanted:
            self.taps[index] = self.residual.clone()


def write_chain(cache: SlotCache, inputs: RowInputs) -> None:
    """Rows of a chain enter the slot table."""
    cache.table.view(-1).index_copy_(0, inputs.writes.long(), inputs.slots)


def run_layers(
    context: Context, layers: Sequence[Layer], inputs: RowInputs, stream: Stream, taps: Sequence[int] = ()
) -> None:
    """All layers of a language model."""
    for index, layer in enumerate(layers):
        normed = stream.norm(context, layer.input_norm, input_type(layer.qkv, context.dtype))
        stream.tap(index, taps)
        run_layer(context, index, layer, inputs, stream, normed)


def run_layer(context: Context, index: int, layer: Layer, inputs: RowInputs, stream: Stream, normed: Tensor) -> None:
    """One layer. normed: what q, k and v read, [rows, …]; the keys and values of these rows enter the cache."""
    ops, shape, cache, dtype = context.ops, context.shape, context.cache, context.dtype
    qkv = ops.linear(normed, layer.qkv, torch.float32)
    size = (len(qkv), shape.num_heads, shape.head_dim)
    query = torch.empty(size, dtype=torch.float16, device=qkv.device)
    attended = torch.empty(size, dtype=input_type(layer.output, dtype), device=qkv.device)
    keys, values = cache.keys[index], cache.values[index]
    tables = (context.cosine, context.sine, inputs.positions, inputs.slots)
    ops.rope_cache(qkv, *tables, query, keys, values, layer.q_norm, layer.k_norm, shape.rms_norm_eps)
    ops.attention(query, keys, values, cache.table, inputs.sequences, inputs.cached, inputs.ancestors, out=attended)
    stream.delta = ops.linear(attended.view(len(qkv), -1), layer.output, torch.float32)
    gate_up = ops.linear(
        stream.norm(context, layer.post_attention_norm, input_type(layer.gate_up, dtype)), layer.gate_up
    )
    inner = gate_up.new_empty((len(gate_up), shape.intermediate_size), dtype=input_type(layer.down, dtype))
    ops.silu_mul(gate_up, inner)
    stream.delta = ops.linear(inner, layer.down, torch.float32)
