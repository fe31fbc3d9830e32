"""As `compile_linear`, for everything of a layer that is not linear, and for sampling.

python -m tests.deploy.kernels.gpu.compile_layers CAPABILITY
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from deploy.kernels.gpu import attention, embedding, rms_norm, rope_cache, sampling, silu_mul, truncation
from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.runtime.sampling import SamplingParams
from tests.deploy.kernels.gpu.compile_linear import Recorder, describe

# Kernels that a call launches, by name in their modules.
KERNELS: dict[ModuleType, list[str]] = {
    rms_norm: ["_rms_norm_kernel"],
    silu_mul: ["_silu_mul_kernel"],
    embedding: ["_embedding_kernel"],
    rope_cache: ["_rope_cache_kernel"],
    attention: ["_attention_kernel", "_merge_kernel"],
    truncation: ["_last_kernel"],
    sampling: ["_block_kernel", "_row_kernel"],
}
SHAPES = [(9, 3, 64), (12, 2, 128), (4, 4, 32)]
CONTEXT, SLOTS = 8192, 64


def report_all(name: str, call: Callable[[], object]) -> None:
    recorders = {}
    for module, attributes in KERNELS.items():
        for attribute in attributes:
            recorders[attribute] = Recorder(getattr(module, attribute))
            setattr(module, attribute, recorders[attribute])
    call()
    for module, attributes in KERNELS.items():
        for attribute in attributes:
            setattr(module, attribute, recorders[attribute].kernel)
            for compiled in recorders[attribute].compiled:
                describe(f"{attribute}: {name}", compiled)


def report_attention(shape: tuple[int, int, int], rows: int) -> None:
    heads, kv_heads, head_dim = shape
    numbers = torch.zeros(rows, dtype=torch.int32)
    q = torch.zeros(rows, heads, head_dim, dtype=torch.float16)
    caches = [torch.zeros(SLOTS, kv_heads, head_dim, dtype=torch.float16) for _ in range(2)]
    table, own = torch.zeros(2, CONTEXT, dtype=torch.int32), torch.zeros(rows, min(rows, 64), dtype=torch.int32)
    out = torch.zeros(rows, heads, head_dim, dtype=torch.bfloat16)
    name = f"heads {shape}, {rows} rows"
    report_all(name, lambda: attention.attention(q, *caches, table, numbers, numbers, own, out))
    qkv = torch.zeros(rows, (heads + 2 * kv_heads) * head_dim)
    angles, norm = torch.zeros(CONTEXT, head_dim // 2), torch.ones(head_dim)
    for norms in ((), (norm, norm, 1e-6)):
        arguments = (qkv, angles, angles, numbers, numbers, q, *caches, *norms)
        report_all(name, lambda arguments=arguments: rope_cache.rope_cache(*arguments))


def report_sampling(params: SamplingParams, count: int, ids: torch.Tensor | None) -> None:
    rows = SamplingRows.of([params] * 2, [0] * 2, [0] * 2, torch.device("cpu"))
    logits = torch.zeros(2, 49152)
    report_all(f"{params}, {count}", lambda: sampling.candidates(logits, rows, count, token_ids=ids))


def main() -> None:
    warnings.simplefilter("ignore")
    for n in (576, 8192):
        x, delta = torch.zeros(3, n), torch.zeros(3, n, dtype=torch.bfloat16)
        report_all(f"{n}", lambda x=x: rms_norm.rms_norm(x, x[0], 1e-5, torch.bfloat16))
        report_all(f"{n}", lambda x=x, d=delta: rms_norm.add_rms_norm(x, d, x[0], 1e-5, torch.bfloat16))
        report_all(f"{n}", lambda d=delta: silu_mul.silu_mul(d))
        report_all(f"{n}", lambda d=delta: embedding.embedding(torch.zeros(3, dtype=torch.int32), d))
    for shape in SHAPES:
        for rows in (1, 64, 512):
            report_attention(shape, rows)
    ids = torch.arange(49152)
    report_sampling(SamplingParams(), 1, None)
    report_sampling(SamplingParams(temperature=1.0), 16, ids)
    report_sampling(SamplingParams(temperature=1.0, top_p=0.9), 1, None)


if __name__ == "__main__":
    main()
