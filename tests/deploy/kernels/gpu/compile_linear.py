"""Compile every launch of the linear kernels for a GPU, which takes none; print what came out.

    python -m tests.deploy.kernels.gpu.compile_linear CAPABILITY        (90: an H100)

One line a launch, tab-separated: name, instruction of its dots, bytes of registers spilled, bytes of shared memory.
Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.packed import GroupedInt
from deploy.kernels.gpu import epilogue, flatten, linear16, split_k, w4a8, w4a16, w8a8

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CAPABILITY = int(sys.argv[1])
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def argument_type(value: Any) -> str:
    """Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Recorder:
    """Stands in for a kernel: compiles what it would have launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, list[Any]()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        constants, signature, divisible = dict(keywords), {}, {}
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, arguments, strict=False)):
            if value is None:
                constants[name] = None
            else:
                signature[name] = argument_type(value)
                if signature[name] != "fp32" and (isinstance(value, torch.Tensor) or value % 16 == 0):
                    divisible[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, {n: signature[n] for n in self.kernel.arg_names}, constants, divisible)
        self.compiled.append(triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options))


def spilled(compiled: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]) + int(found[2])


def report(name: str, module: ModuleType, attribute: str, call: Callable[[], object]) -> None:
    kernel = getattr(module, attribute)
    recorder = Recorder(kernel)
    setattr(module, attribute, recorder)
    call()
    setattr(module, attribute, kernel)
    for compiled in recorder.compiled:
        describe(name, compiled)


def describe(name: str, compiled: Any) -> None:
    ptx = compiled.asm["ptx"]
    dot = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    print(name, dot, spilled(compiled), compiled.metadata.shared, sep="	", flush=True)


def grouped(num_in: int, group_size: int, bits: int, form: str = "symmetric") -> GroupedInt:
    scale = np.ones((256, num_in // group_size), dtype=np.float32)
    q = np.zeros((256, num_in), dtype=np.uint8)
    if form == "minimum":
        return GroupedInt(q, scale, -scale, bits, group_size)
    zero = 1 << (bits - 1) if form == "symmetric" else 1
    return GroupedInt.from_zero_point(q, scale, zero, bits=bits, group_size=group_size)


def main() -> None:
    warnings.simplefilter("ignore")
    num_in = 1024
    # Compiled by itself below; there is no device on which it could follow the others.
    for module in (w4a16, linear16, epilogue):
        vars(module)["reduce_partials"] = lambda *arguments: arguments[1]
    weight_8 = w8a8.pack_w8(grouped(num_in, num_in, 8), "cpu")
    weight_4 = w4a8.pack_w4_channel(grouped(num_in, num_in, 4), "cpu")
    matrix = torch.zeros(256, num_in, dtype=torch.bfloat16)
    for rows in (1, 32, 64, 512):
        x = torch.zeros(rows, num_in, dtype=torch.bfloat16)
        quantized = x.to(torch.int8), torch.ones(rows)
        for group_size, form in [(128, "asymmetric"), (32, "minimum")]:
            weight = w4a16.pack_w4(grouped(num_in, group_size, 4, form), "cpu")
            name = f"w4a16, {form}, groups of {group_size}, {rows} rows"
            report(name, w4a16, "_kernel", partial(w4a16.linear_w4a16, x, weight))
        report(f"linear16, {rows} rows", linear16, "_kernel", partial(linear16.linear_16, x, matrix))
        report(f"w8a8, {rows} rows", w8a8, "_kernel", partial(w8a8.linear_w8a8, *quantized, weight_8))
        report(f"w4a8, {rows} rows", w4a8, "_kernel", partial(w4a8.linear_w4a8, *quantized, weight_4))
    sums, out = torch.zeros(4, 5, 256), torch.zeros(5, 256, dtype=torch.bfloat16)
    report("reduce_partials", split_k, "_reduce_kernel", partial(split_k.reduce_partials, sums, out))
    x, scale = torch.zeros(256, num_in), torch.ones(1)
    channels = np.arange(2 * num_in, dtype=np.int32) // 2
    copies = flatten.pack_copies(LayerInputs(ActivationGrid(4, "tensor"), 1.0, channels), "cpu")
    for dtype in (torch.int8, torch.bfloat16):
        quantize = partial(w8a8.quantize_rows, x, dtype=dtype)
        report(f"quantize_rows, {dtype}", w8a8, "_quantize_kernel", quantize)
        quantize = partial(w8a8.quantize_static, x, scale, dtype=dtype)
        report(f"quantize_static, {dtype}", w8a8, "_quantize_kernel", quantize)
        quantize = partial(flatten.quantize_flattened, x, scale, copies, dtype)
        report(f"quantize_flattened, {dtype}", flatten, "_flatten_kernel", quantize)


if __name__ == "__main__":
    main()
