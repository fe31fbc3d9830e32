import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors


def rewrite(directory, change):
    """Apply `change` to the tensors of the model's file."""
    path = directory / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {}
    for name in file.names():
        array = file.array(name).copy()
        tensors[name] = BFloat16(array) if file.dtype(name) == "BF16" else array
    change(tensors)
    write_safetensors(path, tensors)


def test_packed_and_plain_layers_are_read(tmp_path, tiny):
    packed = ModelDirectory.open(tiny.model(tmp_path / "p", tiny.config(), tiny.Quantized()))
    plain = ModelDirectory.open(tiny.model(tmp_path / "f", tiny.config()))
    name = "model.layers.1.mlp.down_proj"
    assert isinstance(packed.linear(name), GroupedInt)
    weight = plain.linear(name)
    assert weight.dtype == np.float32
    assert weight.shape == (96, 160)
    assert packed.eos_token_ids == (2,)
    packed.release(name)
    assert packed.linear(name).shape == (96, 160)


def test_rows_are_those_of_the_whole_tensor(tmp_path, tiny):
    model = ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config()))
    rows = np.array([5, 0, 262, 5])
    whole = model.float32("model.embed_tokens.weight")
    assert np.array_equal(model.rows_float32("model.embed_tokens.weight", rows), whole[rows])


def test_tensors_are_given_in_the_files_own_types_wherever_they_lie(tmp_path, tiny):
    directory = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    names = {"model.norm.weight": np.uint16, "model.layers.0.self_attn.q_proj.weight_packed": np.int32}
    with ModelDirectory.open(directory) as model:
        arrays = {name: model.array(name).copy() for name in names}
        assert "model.norm.weight" in model
        assert "model.norm.bias" not in model
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    moved = ModelDirectory.open(directory)
    for name, dtype in names.items():
        assert arrays[name].dtype == dtype
        assert moved.array(name).flags.aligned
        assert np.array_equal(moved.array(name), arrays[name])


def test_a_sharded_model_reads_the_same(tmp_path, tiny):
    one = tiny.model(tmp_path / "one", tiny.config(tie_word_embeddings=False))
    AutoModelForCausalLM.from_pretrained(one, dtype="auto").save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    first, second = ModelDirectory.open(one), ModelDirectory.open(tmp_path / "many")
    for name in first.names():
        assert np.array_equal(first.float32(name), second.float32(name))
    next((tmp_path / "many").glob("model-00002*")).unlink()
    with pytest.raises(FormatError, match="model-00002"):
        ModelDirectory.open(tmp_path / "many")


def test_generation_config_names_the_end_tokens(tmp_path, tiny):
    directory = tiny.model(tmp_path / "m", tiny.config())
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert ModelDirectory.open(directory).eos_token_ids == (2, 7)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(FormatError, match="9999"):
        ModelDirectory.open(directory)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("model.norm.weight"), "model.norm.weight' is missing"),
        (drop("model.layers.0.self_attn.q_proj.weight_packed"), "weight_packed' is missing"),
        (drop("model.layers.0.self_attn.q_proj.weight_zero_point"), "symmetric=False"),
        (put("model.norm.weight", np.ones(95, np.float32)), r"expected F32 or F16 or BF16 \[96\]"),
        (put("model.norm.weight", np.ones(96, np.int32)), "I32"),
        (put("model.layers.9.mlp.up_proj.weight", np.ones(2, np.float32)), "does not belong"),
        (put("lm_head.weight", np.ones((263, 96), np.float32)), "differs from the embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_file_and_name(tmp_path, tiny, change, reason):
    directory = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    rewrite(directory, change)
    with pytest.raises(FormatError, match=reason) as caught:
        ModelDirectory.open(directory)
    assert str(directory) in str(caught.value)


def test_derived_buffers_and_a_repeated_tied_head_are_accepted(tmp_path, tiny):
    directory = tiny.model(tmp_path / "m", tiny.config())

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    rewrite(directory, change)
    ModelDirectory.open(directory)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", None, "no such file"),
        ("config.json", "{", "not readable as JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"model_type": "bert"}', "model_type='bert'"),
        ("model.safetensors", None, "neither"),
        ("model.safetensors", "x", "truncated"),
    ],
)
def test_a_broken_directory_is_refused(tmp_path, tiny, file, content, reason):
    directory = tiny.model(tmp_path / "m", tiny.config())
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises(FormatError, match=reason):
        ModelDirectory.open(directory)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no such directory"):
        ModelDirectory.open(tmp_path / "nowhere")
