"""What the GPU can do at best: reading and copying its memory, and products of bfloat16 matrices."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu_run import Run, time_ms

_BLOCK = 4096


@triton.jit
def _read_kernel(x_ptr: tl.tensor, sum_ptr: tl.tensor, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Every program reads NUM_BLOCKS blocks that follow one another."""
    first = tl.program_id(0).to(tl.int64) * NUM_BLOCKS * BLOCK
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for block in range(NUM_BLOCKS):
        total += tl.load(x_ptr + first + block * BLOCK + i)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read_gb_s(run: Run, num_bytes: int) -> float:
    """Reading alone, which is what a layer does with its weights. `num_bytes`: a multiple of 128 KiB."""
    num_blocks = 8
    x = torch.ones(num_bytes // 4, dtype=torch.int32, device=run.device)
    programs = x.numel() // (_BLOCK * num_blocks)
    sums = torch.empty(programs, dtype=torch.int32, device=run.device)

    def read() -> None:
        _read_kernel[(programs,)](x, sums, NUM_BLOCKS=num_blocks, BLOCK=_BLOCK, num_warps=8)

    best = time_ms(run, [read], 20)["min"]
    assert int(sums.sum()) == x.numel()
    return num_bytes / best / 1e6


def copy_gb_s(run: Run, num_bytes: int) -> float:
    """torch's copy; bytes read and bytes written together."""
    source = torch.ones(num_bytes // 4, dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_ms(run, [lambda: target.copy_(source)], 20)["min"] / 1e6


def matmul_tflop_s(run: Run, size: int) -> float:
    """cuBLAS on square bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=run.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / time_ms(run, [lambda: torch.mm(a, b, out=out)], 10)["min"] / 1e9


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """read_gb_s, copy_gb_s, matmul_tflop_s."""
    num_bytes, size = (1 << 20, 64) if run.is_tiny else (2 << 30, 8192)
    result = {
        "read_gb_s": read_gb_s(run, num_bytes),
        "copy_gb_s": copy_gb_s(run, num_bytes),
        "matmul_tflop_s": matmul_tflop_s(run, size),
    }
    print(
        f"reads {result['read_gb_s']:.0f} GB/s, copies {result['copy_gb_s']:.0f} GB/s, "
        f"bfloat16 products {result['matmul_tflop_s']:.1f} Tflop/s"
    )
    return result
