"""Layers whose inputs have one scale a row against the layer that quantizes them in groups of 32, by number of rows.

    python -m benchmarks.row_scales [--shapes 1536x576,8960x1536] [--rows 1,2,4,…] [--threads N] [--json OUT]

The shapes are the widest layers of SmolLM2-135M and Qwen2.5-Coder-1.5B, outputs × inputs; each is there as often as
fills `--megabytes` of 4-bit codes, so that weights come from memory as in a model. Forms take turns, so that what else
the machine does meets all of them. A time has the quantization of the inputs in it. Gmac/s counts a layer's products
without copies of channels; "of dot" is what was computed, copies included, over the machine's own integer dot products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernels import random_packed
from benchmarks.machine import fingerprint, write_json
from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.safetensors_file import to_bfloat16
from deploy.kernels.cpu.library import Matrix, Runtime, SourceWeights

TOKEN, TENSOR4, TENSOR8 = ActivationGrid(8, "token"), ActivationGrid(4, "tensor"), ActivationGrid(8, "tensor")


@dataclass(frozen=True)
class Form:
    """bits: of the weights. group_size: None for a scale per output. grid: None for inputs in groups of 32."""

    bits: int
    group_size: int | None
    grid: ActivationGrid | None
    expansion: float = 1.0
    is_symmetric: bool = True


BASELINE = "W4 g32 · A8 g32"
FORMS = {
    BASELINE: Form(4, 32, None, is_symmetric=False),
    "W4 g32 · A8 row": Form(4, 32, TOKEN, is_symmetric=False),
    "W4 g128 · A8 row": Form(4, 128, TOKEN, is_symmetric=False),
    "W4 channel · A8 row": Form(4, None, TOKEN),
    "W8 channel · A8 row": Form(8, None, TOKEN),
    "W8 channel · A8 static": Form(8, None, TENSOR8),
    "W4 channel · A4 ×1.00": Form(4, None, TENSOR4),
    "W4 channel · A4 ×1.25": Form(4, None, TENSOR4, 1.25),
    "W4 g32 · A4 ×1.25": Form(4, 32, TENSOR4, 1.25, is_symmetric=False),
}


def random_inputs(rng: np.random.Generator, form: Form, num_in: int) -> LayerInputs | None:
    """A second column for random channels, until there are `expansion` times as many: which ones does not matter."""
    if form.grid is None or form.grid.scope == "token":
        return None if form.grid is None else LayerInputs(form.grid)
    flatten, extra = None, round(num_in * (form.expansion - 1) / 32) * 32
    if extra:
        copied = rng.choice(num_in, extra, replace=False)
        flatten = np.sort(np.concatenate([np.arange(num_in), copied])).astype(np.int32)
    return LayerInputs(form.grid, float(np.float32(3.0 / form.grid.qmax)), flatten)


def random_layer(rng: np.random.Generator, form: Form, num_out: int, num_in: int) -> SourceWeights | None:
    """A layer of random codes as a file holds it; None where its groups do not divide its columns."""
    inputs = random_inputs(rng, form, num_in)
    columns = num_in if inputs is None or inputs.flatten is None else inputs.flatten.size
    size = columns if form.group_size is None else form.group_size
    if columns % size:
        return None
    if not form.is_symmetric:
        packed = random_packed(rng, (num_out, columns), size)
        return SourceWeights(packed.shape, packed.codes, "BF16", packed.scale, packed.minimum, 4, size, inputs=inputs)
    is_bytes = form.bits == 8
    words = rng.integers(-(1 << 31), 1 << 31, (num_out, columns * form.bits // 32)).astype(np.int32)
    codes = words.view(np.int8) if is_bytes else words
    scale = to_bfloat16(rng.uniform(0.5, 1.5, (num_out, columns // size)).astype(np.float32))
    shape = (num_out, columns)
    return SourceWeights(shape, codes, "BF16", scale, None, form.bits, size, is_bytes=is_bytes, inputs=inputs)


def times_of(layers: dict[str, list[Matrix]], rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a pass over the matrices of each form, `repeats` of them in turn, after one that does not count."""
    num_in = next(iter(layers.values()))[0].shape[1]
    x = np.random.default_rng(1).standard_normal((rows, num_in)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 1):
        for name, matrices in layers.items():
            begin = time.perf_counter()
            for matrix in matrices:
                matrix.multiply(x)
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def measure(
    layers: dict[str, list[Matrix]], columns: dict[str, int], rows: int, repeats: int, dot: float
) -> dict[str, dict[str, float]]:
    """By form: microseconds of a layer, and what that comes to. dot: products per second that the machine can do."""
    times, found = times_of(layers, rows, repeats), {}
    num_out, num_in = layers[BASELINE][0].shape
    for name, seconds in times.items():
        count, least = len(layers[name]), min(seconds)
        per_second = rows * num_out * num_in * count / least
        found[name] = {
            "us": statistics.median(seconds) / count * 1e6,
            "min_us": least / count * 1e6,
            "of_baseline": least / min(times[BASELINE]),
            "gmac_s": per_second / 1e9,
            "of_dot": per_second / dot * columns[name] / num_in,
        }
    return found


def read_shapes(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]
    return [(num_out, num_in) for num_out, num_in in pairs]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=read_shapes, default=[(1536, 576), (8960, 1536)])
    rows = [1, 2, 4, 6, 8, 16, 32, 64, 128, 512]
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=rows)
    parser.add_argument("--megabytes", type=int, default=96, help="4-bit codes of each form")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    runtime = Runtime(arguments.threads)
    dot = max(runtime.dot_throughput(40) for _ in range(4))
    result: dict[str, Any] = {"machine": fingerprint(runtime), "ceilings": {"dot_gmac_s": dot / 1e9}, "layers": {}}
    print(f"{runtime.isa}, {runtime.threads} threads; int8 dot {dot / 1e9:.0f} Gmac/s")
    rng = np.random.default_rng(0)
    for num_out, num_in in arguments.shapes:
        count = max(1, arguments.megabytes * 2_000_000 // (num_out * num_in))
        made = {name: random_layer(rng, form, num_out, num_in) for name, form in FORMS.items()}
        sources = {name: source for name, source in made.items() if source is not None}
        layers = {name: [Matrix(runtime, source) for _ in range(count)] for name, source in sources.items()}
        columns = {name: source.shape[1] for name, source in sources.items()}
        print(f"\n{count} layers of {num_out} × {num_in}")
        print(f"{'':24}{'rows':>5}{'µs':>10}{'min':>10}{'of g32':>8}{'Gmac/s':>9}{'of dot':>8}")
        by_rows = result["layers"].setdefault(f"{num_out}x{num_in}", {})
        for rows in arguments.rows:
            by_rows[str(rows)] = measure(layers, columns, rows, arguments.repeats, dot)
            for name, found in by_rows[str(rows)].items():
                print(
                    f"{name:24}{rows:5}{found['us']:10.1f}{found['min_us']:10.1f}{found['of_baseline']:8.2f}"
                    f"{found['gmac_s']:9.0f}{found['of_dot']:8.0%}",
                    flush=True,
                )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
