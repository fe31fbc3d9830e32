import numpy as np
import pytest

from deploy.formats.activations import ActivationGrid, LayerInputs
from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.reference.model import ReferenceBackend
from deploy.kernels.reference.row_scales import quantize_rows
from deploy.kernels.reference.saturation import count_saturation, largest_codes
from deploy.runtime.backend import Row

STATIC = ActivationGrid(4, "tensor")


def test_what_a_channel_can_hold_grows_with_its_copies():
    flatten = np.array([0, 0, 0, *range(1, 30)], np.int32)
    assert largest_codes(LayerInputs(STATIC, 0.5, flatten)).tolist() == [21] + [7] * 29
    assert largest_codes(LayerInputs(STATIC, 0.5)) == 7


def test_counted_is_what_the_layers_cut_off(tmp_path, tiny):
    kinds = {"[qkv]_proj": tiny.Quantized(4, None, "symmetric", STATIC, 1.3), "o_proj": tiny.Quantized(8, 32)}
    kinds["gate|up"] = tiny.Quantized(8, 32, "symmetric", ActivationGrid(8, "token"))
    directory = ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config(), kinds))
    texts = [[5, 9, 200], [77, 3]]
    found = count_saturation(directory, texts)
    assert set(found) == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    read = {}
    backend = ReferenceBackend(directory, watch=lambda name, x: read.setdefault(name, []).append(x))
    for text in texts:
        backend.forward([Row(token, i, 0, i - 1) for i, token in enumerate(text)])
        backend.keep(0, [])
    assert len(read) == len(directory.layers)
    for name, counted in found.items():
        inputs, x = directory.inputs(name), np.concatenate(read[name])
        codes, scale = quantize_rows(x, inputs)
        restored = np.zeros(x.shape)
        for column, channel in enumerate(inputs.flatten):
            restored[:, channel] += codes[:, column] * scale
        # What is merely rounded is off by half a step at most; ties and rounding of the product aside.
        lost = np.abs(restored - x) > 0.5001 * inputs.scale
        assert counted.num_values == x.size
        assert counted.num_saturated == pytest.approx(lost.sum(), abs=1)
        assert 0 < counted.share < 0.5
