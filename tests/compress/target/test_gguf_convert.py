"""GGUF → model directory: against transformers' own reader where it has one, else against what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from compress.target.gguf_convert import convert
from compress.target.gguf_source import GgufFile
from compress.target.inspect import check_source, open_gguf, read_shape
from compress.target.sources import Source, find_source
from deploy.formats.architectures import ModelShape
from deploy.formats.model_dir import ModelDirectory

MIXED = {"q_proj": Kind.Q4_0, "k_proj": Kind.Q4_1, "v_proj": Kind.Q8_0, "down_proj": Kind.F16, "gate_proj": Kind.BF16}


def converted(model: Any, tmp_path: Path) -> ModelDirectory:
    convert(GgufFile(model.write(tmp_path / "model.gguf")), tmp_path / "out")
    return ModelDirectory.open(tmp_path / "out")


def assert_tensors_equal(files: ModelDirectory, expected: dict[str, np.ndarray]) -> None:
    assert sorted(files.names()) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(files.float32(name), values, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_value_that_was_stored_comes_back_under_its_name(
    tiny: Any, tmp_path: Path, architecture: str, is_tied: bool
) -> None:
    model = tiny.Gguf(shape=tiny.Shape(architecture, is_tied=is_tied), kinds=MIXED)
    files = converted(model, tmp_path)
    assert_tensors_equal(files, model.expected())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert model.shape.config().items() <= config.items()
    assert ModelShape.from_config(config) == ModelShape.from_config(model.shape.config())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_own_reader_gives_the_same_model(tiny: Any, tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = tiny.Gguf(shape=tiny.Shape(architecture, is_tied=False), kinds=MIXED | {"down_proj": Kind.Q4_0})
    files = converted(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32")
    assert_tensors_equal(files, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    config = load_gguf_checkpoint(tmp_path / "model.gguf")["config"]
    ours = files.config
    shared = config.keys() & ours.keys() - {"architectures", "rms_norm_eps", "tie_word_embeddings"}
    assert len(shared) >= 8
    assert {key: ours[key] for key in shared} == {key: config[key] for key in shared}
    assert np.float32(ours["rms_norm_eps"]) == np.float32(config["rms_norm_eps"])


def test_ids_of_special_tokens_and_the_ends_of_a_text_are_the_files(tiny: Any, tmp_path: Path) -> None:
    tokens = tiny.vocabulary()
    end_of_turn = tokens.index("<|endoftext|>")
    files = converted(tiny.Gguf(fields={"tokenizer.ggml.eot_token_id": end_of_turn}), tmp_path)
    assert files.config["bos_token_id"] == tokens.index("<|im_start|>")
    assert files.config["eos_token_id"] == tokens.index("<|im_end|>")
    assert files.eos_token_ids == tuple(sorted((end_of_turn, tokens.index("<|im_end|>"))))


def test_a_tied_matrix_that_is_stored_twice_is_taken_once_from_the_finer_copy(tiny: Any, tmp_path: Path) -> None:
    embedding = tiny.Shape().tensors()["model.embed_tokens.weight"]
    model = tiny.Gguf(kinds={"embed_tokens": Kind.Q4_0}, extra={"output.weight": embedding})
    files = converted(model, tmp_path)
    assert files.config["tie_word_embeddings"] is True
    np.testing.assert_array_equal(files.float32("model.embed_tokens.weight"), embedding)


def test_two_different_matrices_are_not_taken_for_a_tied_one(tiny: Any, tmp_path: Path) -> None:
    files = converted(tiny.Gguf(shape=tiny.Shape(is_tied=False)), tmp_path)
    assert files.config["tie_word_embeddings"] is False


def llama3_divisors(num: int, theta: float, factor: float) -> np.ndarray:
    """The table that convert_hf_to_gguf.py writes for rope type llama3, one frequency at a time."""
    divisors = []
    for index in range(num):
        frequency = 1.0 / theta ** (2 * index / (2 * num))
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_llama_3s_frequency_table_becomes_its_rope_parameters(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    table = llama3_divisors(8, 500000.0, 8.0)
    model = tiny.Gguf(fields={"llama.rope.freq_base": 500000.0}, extra={"rope_freqs.weight": table})
    converted(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    plain = 500000.0 ** -(np.arange(8) / 8)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(frequencies.numpy(), plain / table, rtol=1e-5)


def test_any_other_frequency_table_is_refused(tiny: Any, tmp_path: Path) -> None:
    table = np.linspace(1, 8, 8).astype(np.float32)
    with pytest.raises(ValueError, match=r"target\.path=.*rope_freqs.weight is not Llama-3's scaling"):
        converted(tiny.Gguf(extra={"rope_freqs.weight": table}), tmp_path)


@pytest.mark.parametrize(
    ("fields", "extra", "left_out", "reason"),
    [
        ({"llama.rope.scaling.type": "yarn"}, (), (), "rope scaling 'yarn' is not supported; supported: none, llama3"),
        ({"llama.embedding_length": None}, (), (), "lacks the field llama.embedding_length"),
        ({"tokenizer.ggml.model": "llama"}, (), (), "tokenizer 'llama'; only byte-level BPE"),
        ({"tokenizer.ggml.tokens": None}, (), (), "lacks the field tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.pre": "chaos"}, (), (), "tokenizer.ggml.pre='chaos' is not known"),
        ({"llama.rope.dimension_count": 8}, (), (), "llama.rope.dimension_count=8"),
        ({}, ("blk.0.ffn_gate_inp.weight",), (), "no supported model has: blk.0.ffn_gate_inp.weight"),
        ({}, (), ("model.layers.1.mlp.up_proj.weight",), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        ({}, (), ("model.embed_tokens.weight",), "lacks the tensor model.embed_tokens.weight"),
    ],
)
def test_what_cannot_be_a_target_is_refused_before_work_naming_the_path(
    tiny: Any, tmp_path: Path, fields: dict[str, Any], extra: tuple[str, ...], left_out: tuple[str, ...], reason: str
) -> None:
    added = {name: np.ones((3, 32), np.float32) for name in extra}
    path = tiny.Gguf(fields=fields, extra=added, left_out=left_out).write(tmp_path / "model.gguf")
    open_gguf.cache_clear()
    with pytest.raises(ValueError, match=r"^target\.path=") as caught:
        check_source(find_source("gguf", str(path), None, None))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_shape_is_read_without_reading_weights(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Gguf(shape=tiny.Shape("qwen2"))
    source = Source("gguf", model.write(tmp_path / "model.gguf"), "model.gguf")
    open_gguf.cache_clear()
    assert read_shape(source) == ModelShape.from_config(model.shape.config())


@pytest.mark.slow
def test_the_embedded_model_is_what_transformers_reads(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny.embedded_file()
    convert(GgufFile(path), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").state_dict()
    theirs.pop("lm_head.weight")  # tied
    with ModelDirectory.open(tmp_path) as files:
        assert files.shape.tied_embeddings
        assert_tensors_equal(files, {name: tensor.numpy() for name, tensor in theirs.items()})
