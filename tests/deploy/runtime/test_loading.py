"""How a model's files become a backend's, native or the GPU's: whole, in shards, and where a number is none."""

import json

import numpy as np
import pytest

from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors
from tests.deploy.runtime.rows import chain


def test_a_weight_that_is_not_finite_names_its_layer(open_model, tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), None)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0] + start
    data[begin : begin + 2] = b"\x80\x7f"  # infinity in bfloat16
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj.*not finite"):
        open_model(path)


def test_shards_load_like_one_file(open_model, tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    rows = chain([1, 2, 3])
    expected = open_model(path).forward(rows).logits
    with SafetensorsFile(path / "model.safetensors") as file:
        names = file.names()
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, chosen in parts.items():
            tensors = {n: BFloat16(file.array(n)) if file.dtype(n) == "BF16" else file.array(n) for n in chosen}
            write_safetensors(path / part, tensors)
    index = {"weight_map": {name: part for part, chosen in parts.items() for name in chosen}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(open_model(path).forward(rows).logits, expected)
