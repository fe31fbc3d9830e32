"""Devices for tests of the GPU backend, and rows to give it."""

import numpy as np
import torch

from deploy.runtime import devices, gpu_device
from deploy.runtime.backend import Row
from deploy.runtime.gpu_model import Device
from deploy.runtime.gpu_ops import reference_ops, triton_ops

VOCABULARY = 263
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


def chain(tokens, start=0, sequence=0):
    return [Row(int(token), start + i, sequence, i - 1) for i, token in enumerate(tokens)]


def fill(backend, tokens, sequence=0):
    """Make `tokens` what the sequence's cache holds."""
    backend.reset(sequence)
    if len(tokens):
        backend.forward(chain(tokens, sequence=sequence), logit_rows=[])
        backend.keep(sequence, range(len(tokens)))


def decode_path(backend, context, path, sequence=0):
    """Logits after each token of `path`, fed one by one behind `context`."""
    fill(backend, context, sequence)
    logits = []
    for i, token in enumerate(path):
        logits.append(backend.forward([Row(int(token), len(context) + i, sequence)]).logits[0])
        backend.keep(sequence, [0])
    return np.array(logits)


def random_tree(rng, count, start, sequence=0, offset=0):
    """Rows of a random tree, some of them roots; parents are indices into the whole call."""
    rows = []
    for i in range(count):
        parent = int(rng.integers(-1, i)) if i else -1
        position = start if parent < 0 else rows[parent].position + 1
        rows.append(Row(int(rng.integers(VOCABULARY)), position, sequence, -1 if parent < 0 else parent + offset))
    return rows


def path_to(rows, index):
    path = []
    while index >= 0:
        path.insert(0, index)
        index = rows[index].parent
    return path


LARGEST, MEAN = 0.3, 0.02
"""Tolerances on tiny random models, in standard deviations of the logits: about twice the largest seen. (Where it was
seen, rounding inputs or not moves the reference itself by 0.85: an attention that a few positions share unevenly.)"""


def assert_near(found, expected):
    """Logits within the tolerance, and the same best token wherever the reference's two best differ by more."""
    spread, error = expected.std(), np.abs(found - expected)
    assert error.max() <= LARGEST * spread
    assert error.mean() <= MEAN * spread
    best = np.sort(expected, axis=1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] > LARGEST * spread
    np.testing.assert_array_equal(found.argmax(axis=1)[is_clear], expected.argmax(axis=1)[is_clear])
    return int(is_clear.sum())
