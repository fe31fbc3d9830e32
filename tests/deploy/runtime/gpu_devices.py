"""Devices for tests of the GPU backend, and how near its numbers must be to the reference's."""

import numpy as np
import torch

from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.gpu.w4a8 import W4Channel
from deploy.kernels.gpu.w8a8 import W8
from deploy.kernels.reference.row_scales import RowScaledLinear
from deploy.runtime import devices, gpu_device
from deploy.runtime.gpu_model import Device
from deploy.runtime.gpu_ops import Ops, reference_ops, triton_ops
from deploy.runtime.gpu_weights import RowScaled

FACTS = {"gpu": "none"}


def torch_device(dtype=torch.bfloat16):
    """CPU tensors, operations in plain torch: quick."""
    return Device(torch.device("cpu"), dtype, reference_ops(), FACTS)


def kernel_device(dtype=torch.bfloat16):
    """Triton's kernels, on the GPU where there is one; else on CPU tensors in its interpreter: slow."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return Device(torch.device(where), dtype, triton_ops(), FACTS)


def pretend_gpu(monkeypatch, device):
    """Whoever asks for a GPU gets `device`."""
    monkeypatch.setattr(devices, "find_driver", lambda: devices.Driver((13, 0), 1))
    monkeypatch.setattr(gpu_device, "check_gpu", lambda driver, weight_bytes: None)
    monkeypatch.setattr(gpu_device, "open_device", lambda: device)


LARGEST, MEAN = 0.3, 0.02
"""Tolerances on tiny random models, in standard deviations of the logits: about twice the largest seen. (Where it was
seen, rounding inputs or not moves the reference itself by 0.85: an attention that a few positions share unevenly.)"""


def assert_near(found, expected, *, largest=LARGEST, mean=MEAN):
    """Logits within the tolerance, and the same best token wherever the reference's two best differ by more."""
    spread, error = expected.std(), np.abs(found - expected)
    assert error.max() <= largest * spread
    assert error.mean() <= mean * spread
    best = np.sort(expected, axis=1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] > largest * spread
    np.testing.assert_array_equal(found.argmax(axis=1)[is_clear], expected.argmax(axis=1)[is_clear])
    return int(is_clear.sum())


_PARTS = {
    "qkv": [f"self_attn.{part}_proj" for part in "qkv"],
    "output": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def assert_row_scaled_layers_equal_the_reference(backend, path, rows, monkeypatch):
    """Every layer that quantizes its inputs, on the very rows that it reads in a forward of `rows`.

    Bit for bit where it multiplies integers; else as near as weights rounded to 16 bits are. Returns how many layers
    were of either kind.
    """
    seen, linear = {}, Ops.linear

    def record(self, x, matrix, out_dtype=None):
        y = linear(self, x, matrix, out_dtype)
        if isinstance(matrix, RowScaled):
            seen[id(matrix)] = x.clone(), y.clone()
        return y

    with monkeypatch.context() as patched:
        patched.setattr(Ops, "linear", record)
        backend.forward(rows)
    directory, counts = ModelDirectory.open(path), [0, 0]
    accuracy = torch.finfo(backend.device.dtype).eps
    for index, layer in enumerate(backend.weights.layers):
        for field, parts in _PARTS.items():
            matrix = getattr(layer, field)
            if not isinstance(matrix, RowScaled):
                continue
            x, y = (tensor[: len(rows)].cpu().numpy() for tensor in seen[id(matrix)])
            assert x.dtype == y.dtype == np.float32
            expected = []
            for name in (f"model.layers.{index}.{part}" for part in parts):
                bias = directory.float32(f"{name}.bias") if f"{name}.bias" in directory else None
                expected.append(RowScaledLinear(directory.linear(name), directory.inputs(name), bias)(x))
            is_exact = isinstance(matrix.weight, W8 | W4Channel)
            counts[0 if is_exact else 1] += 1
            if is_exact:
                np.testing.assert_array_equal(y, np.concatenate(expected, axis=1))
            else:
                difference = y - np.concatenate(expected, axis=1)
                assert 0 < difference.std() < 0.5 * accuracy * y.std()
                assert np.abs(difference).max() < 4 * accuracy * y.std()
    return tuple(counts)
