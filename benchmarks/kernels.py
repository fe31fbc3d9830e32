"""Linear layers alone, against what the machine could do: reading memory, and integer dot products.

    python -m benchmarks.kernels [--hidden 576] [--inner 1536] [--layers 30] [--rows 1,6,16] [--json OUT]

Each shape is repeated as often as a model of `--layers` layers has it, so that its weights do not stay in a cache
unless they would in the model. A call into the library costs some ten microseconds a layer, which small layers show;
the whole forward pass (benchmarks.forward) pays it once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import fingerprint, time_ms, write_json
from deploy.formats.safetensors_file import to_bfloat16
from deploy.kernels.cpu.library import Matrix, Runtime, SourceWeights


def random_packed(rng: np.random.Generator, shape: tuple[int, int], group_size: int) -> SourceWeights:
    """A 4-bit layer with zero points, as a file holds it."""
    num_out, num_in = shape
    words = rng.integers(-(1 << 31), 1 << 31, (num_out, num_in // 8)).astype(np.int32)
    scale = to_bfloat16(rng.uniform(0.5, 1.5, (num_out, num_in // group_size)).astype(np.float32))
    zeros = rng.integers(-(1 << 31), 1 << 31, (-(-num_out // 8), num_in // group_size)).astype(np.int32)
    return SourceWeights(shape, words, "BF16", scale, zeros, 4, group_size)


def random_plain(rng: np.random.Generator, shape: tuple[int, int]) -> SourceWeights:
    """A layer that is quantized to int8 when loaded."""
    return SourceWeights(shape, to_bfloat16(rng.standard_normal(shape).astype(np.float32)), "BF16")


def measure(matrices: list[Matrix], rows: int, repeats: int) -> dict[str, float]:
    """Time of one pass over all `matrices`, GB/s of packed weights and Gmac/s."""
    x = np.random.default_rng(1).standard_normal((rows, matrices[0].shape[1])).astype(np.float32)
    timed = time_ms(lambda: [matrix.multiply(x) for matrix in matrices], repeats)
    num_bytes, products = sum(m.num_bytes for m in matrices), sum(m.shape[0] * m.shape[1] for m in matrices)
    seconds = timed["min"] / 1e3
    return {
        "ms": timed["median"],
        "min_ms": timed["min"],
        "gb_s": num_bytes / seconds / 1e9,
        "gmac_s": products * rows / seconds / 1e9,
    }


def shapes_of(arguments: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """name → outputs, inputs, how many of them."""
    hidden, inner, layers = arguments.hidden, arguments.inner, arguments.layers
    return {
        "int4 hidden→hidden": (hidden, hidden, 2 * layers),
        "int4 hidden→inner": (inner, hidden, 2 * layers),
        "int4 inner→hidden": (hidden, inner, layers),
        "int8 head": (arguments.vocabulary, hidden, 1),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 6, 16, 64])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    runtime = Runtime(arguments.threads)
    read = max(runtime.read_bandwidth(192 << 20, 4) for _ in range(4))
    dot = max(runtime.dot_throughput(40) for _ in range(4))
    result: dict[str, Any] = {
        "machine": fingerprint(runtime),
        "ceilings": {"read_gb_s": read / 1e9, "dot_gmac_s": dot / 1e9},
        "layers": {},
    }
    print(f"{runtime.isa}, {runtime.threads} threads; reads {read / 1e9:.1f} GB/s, int8 dot {dot / 1e9:.0f} Gmac/s")
    print(f"{'':20}{'rows':>5}{'ms':>9}{'min':>9}{'GB/s':>8}{'of read':>9}{'Gmac/s':>9}{'of dot':>8}")
    rng = np.random.default_rng(0)
    for name, (num_out, num_in, count) in shapes_of(arguments).items():
        is_head = name == "int8 head"
        source = (
            random_plain(rng, (num_out, num_in))
            if is_head
            else random_packed(rng, (num_out, num_in), arguments.group_size)
        )
        matrices = [Matrix(runtime, source) for _ in range(count)]
        for rows in arguments.rows:
            found = measure(matrices, rows, arguments.repeats)
            result["layers"].setdefault(name, {})[str(rows)] = found
            print(
                f"{name:20}{rows:5}{found['ms']:9.3f}{found['min_ms']:9.3f}{found['gb_s']:8.1f}"
                f"{found['gb_s'] * 1e9 / read:9.0%}{found['gmac_s']:9.0f}{found['gmac_s'] * 1e9 / dot:8.0%}",
                flush=True,
            )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
