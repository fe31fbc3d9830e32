"""Models of random weights, made on the device: whole forwards of shapes whose files are not there.

Both levels of the hierarchy say token t + 1 after token t: a layer adds nothing to the residual stream (the scales of
the output and down projections are 0), and an embedding's row is the head's of the token after it. So acceptance can be
stated to the token. What is computed and read is that of real weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu_linear import random_w4
from benchmarks.gpu_run import Run
from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.kernels.gpu.w4a16 import W4
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_eagle import GpuEagle
from deploy.runtime.gpu_model import Device
from deploy.runtime.gpu_ops import triton_ops
from deploy.runtime.gpu_weights import Head, LanguageModel, Layer, Matrix16

DTYPE = torch.bfloat16


def llama3(num_layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> ModelShape:
    """A shape of Llama 3's kind; its context is as long as the measurements need."""
    return ModelShape.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": num_layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
        }
    )


SHAPES = {"8B": llama3(32, 4096, 32, 8, 14336, 128256), "70B": llama3(80, 8192, 64, 8, 28672, 128256)}
TINY_SHAPES = {"8B": llama3(1, 128, 4, 2, 128, 300), "70B": llama3(2, 128, 4, 2, 256, 300)}
DRAFT_VOCABULARY, TINY_DRAFT_VOCABULARY = 32000, 60


def shapes_of(run: Run) -> dict[str, ModelShape]:
    """Name → shape; tiny ones in the interpreter."""
    return TINY_SHAPES if run.is_tiny else SHAPES


def random_model(run: Run, shape: ModelShape, *, seed: int = 0) -> GpuBackend:
    """4-bit layers in groups of 128, embedding and head of 16 bits."""
    generator = torch.Generator(run.device).manual_seed(seed)
    head = torch.randn((shape.vocab_size, shape.hidden_size), generator=generator, device=run.device, dtype=DTYPE)
    weights = LanguageModel(
        embedding=torch.roll(head, -1, dims=0),
        layers=tuple(_layer(run, shape, seed + index) for index in range(shape.num_layers)),
        norm=torch.ones(shape.hidden_size, device=run.device),
        head=Matrix16(head),
        head_ids=None,
    )
    return GpuBackend(shape, weights, Device(run.device, DTYPE, triton_ops(), {}))


def _layer(run: Run, shape: ModelShape, seed: int) -> Layer:
    hidden, inner, width = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    num_qkv = width + 2 * shape.num_kv_heads * shape.head_dim
    norm = torch.ones(hidden, device=run.device)
    return Layer(
        input_norm=norm,
        qkv=random_w4(run, num_qkv, hidden, seed),
        q_norm=None,
        k_norm=None,
        output=_silent(random_w4(run, hidden, width, seed)),
        post_attention_norm=norm,
        gate_up=random_w4(run, 2 * inner, hidden, seed),
        down=_silent(random_w4(run, hidden, inner, seed)),
    )


def _silent(weight: W4) -> W4:
    return replace(weight, scale=torch.zeros_like(weight.scale))


def random_head(run: Run, target: GpuBackend, *, seed: int = 0) -> GpuEagle:
    """An EAGLE-3 head for `target`; what it drafts means nothing."""
    shape = target.shape
    layers = sorted({min(2, shape.num_layers), shape.num_layers // 2, max(shape.num_layers - 3, 0)})
    size = TINY_DRAFT_VOCABULARY if run.is_tiny else DRAFT_VOCABULARY
    choices = {"norm_before_residual": True, "num_drafted": 6, "embedding": "reference"}
    config = EagleConfig.for_target(shape, draft_vocab_size=size, feature_layers=tuple(layers), **choices)
    generator = torch.Generator(run.device).manual_seed(seed)

    def matrix(num_out: int, num_in: int) -> Matrix16:
        values = torch.randn((num_out, num_in), generator=generator, device=run.device, dtype=DTYPE)
        return Matrix16(values.mul_(num_in**-0.5))

    hidden, inner, width = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    norm = torch.ones(hidden, device=run.device)
    layer = Layer(
        input_norm=norm,
        qkv=matrix(width + 2 * shape.num_kv_heads * shape.head_dim, 2 * hidden),
        q_norm=None,
        k_norm=None,
        output=matrix(hidden, width),
        post_attention_norm=norm,
        gate_up=matrix(2 * inner, hidden),
        down=matrix(hidden, inner),
    )
    ids = torch.arange(size, device=run.device)
    fc = matrix(hidden, len(layers) * hidden)
    weights = Head(None, fc, norm, layer, norm, matrix(size, hidden), ids)
    return GpuEagle(config, weights, target)
