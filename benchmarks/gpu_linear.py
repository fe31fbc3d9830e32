"""4-bit linear layers by number of rows, on the layer shapes of Llama-3-8B and 70B.

Against what the device's ceilings allow (reading every weight once, at the measured rate of mere reading; all products
at the measured rate of large ones), bfloat16 layers in cuBLAS, and torch's own int4 operation. Weights are random, and
enough copies of each layer take turns that none is read from a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_run import Run, time_ms
from deploy.kernels.gpu.w4a16 import W4, linear_w4a16, linear_w4a16_reference

SHAPES = {
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
"""Model → layer → outputs, inputs; q, k and v are one layer, and so are gate and up."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
TINY_SHAPES = {"tiny": {"o": (70, 256), "down": (17, 1152)}}
TINY_ROWS = (1, 3, 17)
GROUP_SIZE = 128
_CHECKED_OUTPUTS = 17
_REPEATS = 20
# Copies of a layer hold so many times what the last cache does.
_CACHES = 4


def random_w4(run: Run, num_out: int, num_in: int, seed: int) -> W4:
    """A layer with zero points, its weights about 0.02."""
    generator = torch.Generator(run.device).manual_seed(seed)
    draw = partial(torch.randint, generator=generator, dtype=torch.uint8, device=run.device)
    groups = num_in // GROUP_SIZE
    scale = torch.rand(groups, num_out, generator=generator, device=run.device) * 0.002 + 0.003
    codes, zero_point = draw(0, 256, (groups, num_out, GROUP_SIZE // 2)), draw(6, 10, (groups, num_out))
    return W4(codes, scale.to(torch.bfloat16), zero_point, None, num_out, num_in, GROUP_SIZE)


def first_outputs(weight: W4, count: int) -> W4:
    """The layer that has the first `count` outputs of `weight`."""
    assert weight.zero_point is not None
    codes, scale, zero = (t[:, :count].contiguous() for t in (weight.codes, weight.scale, weight.zero_point))
    return replace(weight, codes=codes, scale=scale, zero_point=zero, num_out=count)


def check(run: Run, weight: W4, x: Tensor, rows: tuple[int, ...]) -> dict[str, Any]:
    """Largest error of the first outputs over their deviation, and whether a row is the same in calls of all `rows`.

    Raises RuntimeError where the product is wrong: its time would be of no interest.
    """
    y = linear_w4a16(x, weight, out_dtype=torch.float32)[:, :_CHECKED_OUTPUTS]
    expected = linear_w4a16_reference(x, first_outputs(weight, _CHECKED_OUTPUTS), out_dtype=torch.float32)
    error = float((y - expected).abs().max() / expected.std())
    if not error < 1e-3:
        raise RuntimeError(f"linear_w4a16 [{weight.num_out}, {weight.num_in}] is wrong by {error:.1e} of its deviation")
    first = [linear_w4a16(x[:count], weight, out_dtype=torch.float32)[0] for count in rows]
    # The interpreter's dots are numpy's, whose order depends on a tile's width (up to 16 rows share one).
    comparable = [row for row, count in zip(first, rows, strict=True) if count <= 16 or not run.is_tiny]
    return {"error": error, "same_in_all_rows": all(torch.equal(row, first[0]) for row in comparable)}


def int4_calls(run: Run, weight: W4, copies: int) -> Callable[[Tensor], list[Callable[[], object]]] | str:
    """torch's int4 operation on layers of the same shape, or why it is left out."""
    if run.device.type != "cuda":
        return "torch's int4 operation was not measured: it needs a GPU"
    try:
        octets = torch.randint(0, 256, (weight.num_out, weight.num_in // 2), dtype=torch.uint8, device=run.device)
        packed = [torch.ops.aten._convert_weight_to_int4pack(octets, 8) for _ in range(copies)]
        grid = torch.rand(weight.num_in // GROUP_SIZE, weight.num_out, 2, device=run.device).to(torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm
        multiply(torch.zeros(1, weight.num_in, dtype=torch.bfloat16, device=run.device), packed[0], GROUP_SIZE, grid)
    except (AttributeError, RuntimeError) as error:
        return f"torch's int4 operation was not measured: {str(error).splitlines()[0]}"
    return lambda x: [partial(multiply, x, matrix, GROUP_SIZE, grid) for matrix in packed]


def ceiling_ms(weight: W4, rows: int, ceilings: dict[str, float]) -> float:
    """The least time in which this device could compute the layer."""
    reading = weight.num_bytes / ceilings["read_gb_s"] / 1e6
    products = 2 * rows * weight.num_out * weight.num_in / ceilings["matmul_tflop_s"] / 1e9
    return max(reading, products)


def measure_shape(
    run: Run, shape: tuple[int, int], rows: tuple[int, ...], ceilings: dict[str, float]
) -> dict[str, Any]:
    """What `check` says, and rows → times and ratios."""
    weight = random_w4(run, *shape, seed=0)
    copies = -(-_CACHES * run.cache_bytes // weight.num_bytes)
    weights = [weight] + [random_w4(run, *shape, seed=seed) for seed in range(1, copies)]
    dense = [torch.randn(shape, device=run.device, dtype=torch.bfloat16) for _ in range(-(-copies // 4))]
    int4 = int4_calls(run, weight, copies)
    x = torch.randn(max(rows), shape[1], device=run.device).to(torch.bfloat16)
    result: dict[str, Any] = {"shape": list(shape), "copies": copies, **check(run, weight, x, rows), "rows": {}}
    if isinstance(int4, str):
        result["left_out"] = int4
    for count in rows:
        part = x[:count].contiguous()
        ours = time_ms(run, [partial(linear_w4a16, part, w) for w in weights], _REPEATS)
        cublas = time_ms(run, [partial(torch.nn.functional.linear, part, w) for w in dense], _REPEATS)
        least = ceiling_ms(weight, count, ceilings)
        entry = {
            "ms": ours["median"],
            "min_ms": ours["min"],
            "gb_s": weight.num_bytes / ours["median"] / 1e6,
            "of_ceiling": least / ours["median"],
            "cublas_ms": cublas["median"],
            "times_cublas": cublas["median"] / ours["median"],
        }
        if not isinstance(int4, str):
            entry["int4_ms"] = time_ms(run, int4(part), _REPEATS)["median"]
        result["rows"][str(count)] = entry
    return result


def show(name: str, found: dict[str, Any]) -> None:
    for count, entry in found["rows"].items():
        int4 = f"{entry['int4_ms']:9.4f}" if "int4_ms" in entry else f"{'–':>9}"
        print(
            f"{name:14}{count:>5}{entry['ms']:9.4f}{entry['gb_s']:8.0f}{entry['of_ceiling']:9.0%}"
            f"{entry['cublas_ms']:9.4f}{entry['times_cublas']:7.2f}×{int4}",
            flush=True,
        )
    if not found["same_in_all_rows"]:
        print(f"{name}: a row's result depends on the number of rows")


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Layer → what `measure_shape` gives; `passed`: whether rows are the same in all calls. Needs the ceilings."""
    shapes, rows = (TINY_SHAPES, TINY_ROWS) if run.is_tiny else (SHAPES, ROWS)
    print(f"{'layer':14}{'rows':>5}{'ms':>9}{'GB/s':>8}{'of best':>9}{'cuBLAS':>9}{'faster':>8}{'int4 ms':>9}")
    layers: dict[str, Any] = {}
    late = []
    for model, by_layer in shapes.items():
        for layer, shape in by_layer.items():
            name = f"{model} {layer}"
            if run.is_late:
                late.append(name)
                continue
            layers[name] = measure_shape(run, shape, rows, found["ceilings"])
            show(name, layers[name])
    for text in sorted({layer["left_out"] for layer in layers.values() if "left_out" in layer}):
        print(text)
    if late:
        print(f"no time left for {', '.join(late)}")
    passed = all(layer["same_in_all_rows"] for layer in layers.values())
    return {"group_size": GROUP_SIZE, "passed": passed, "no_time_for": late, "layers": layers}
