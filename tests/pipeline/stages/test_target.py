"""What the target stage makes of a directory: one list of end tokens, a template, a tokenizer for whole texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from compress.target.sources import Source
from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.chat import ChatTemplate
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from pipeline.stages.target import build
from tests.tiny_llama import TINY_LLAMA

SPECIAL = ("<s>", "</s>", "<|end|>")
CONFIG = {**TINY_LLAMA, "architectures": ["LlamaForCausalLM"], "vocab_size": 259, "eos_token_id": 1}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
USER = [{"role": "user", "content": "Why?"}]
Built = Callable[..., tuple[Path, dict[str, Any]]]


def tokenizer(*, begins_with_bos: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    made: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if begins_with_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Makes a source, lets the stage make it plain, and gives the model's directory and the summary."""

    def make(*, template: str | None = None, begins_with_bos: bool = True, max_length: int | None = None) -> Any:
        source, out, rng = tmp_path / "source", tmp_path / "out", np.random.default_rng(0)
        source.mkdir()
        out.mkdir()
        shape = ModelShape.from_config(CONFIG)
        sizes = other_tensors(shape) | {f"{name}.weight": (rows, cols) for name, rows, cols in linear_layers(shape)}
        tensors = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
        write_safetensors(source / "model.safetensors", tensors)
        (source / "config.json").write_text(json.dumps(CONFIG))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
        texts = tokenizer(begins_with_bos=begins_with_bos)
        if max_length is not None:
            texts.enable_truncation(max_length)
            texts.enable_padding(length=max_length, pad_id=1, pad_token="</s>")
        texts.save(str(source / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (source / "tokenizer_config.json").write_text(json.dumps(names))
        if template is not None:
            (source / "chat_template.jinja").write_text(template)
        context: Any = SimpleNamespace(
            stage="target", out=out, summary={}, tracker=SimpleNamespace(summary=lambda stage, values: None)
        )
        build(Source("directory", source, "source"), context)
        return out / "model", context.summary

    return make


def prompt(model: Path) -> str:
    return ChatTemplate.from_directory(model).render(USER, add_generation_prompt=True)


def test_the_templates_own_end_token_is_in_the_list_that_all_read(built: Built) -> None:
    model, summary = built(template=TEMPLATE)
    with ModelDirectory.open(model) as files:
        assert files.eos_token_ids == (1, 2)
    assert summary["added_end_tokens"] == [2]


def test_where_every_end_is_declared_the_files_are_the_sources(built: Built, tmp_path: Path) -> None:
    model, summary = built(template=TEMPLATE.replace("<|end|>", "</s>"))
    for name in ("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"):
        assert (model / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert summary["added_end_tokens"] == []
    assert "added_end_tokens" not in (tmp_path / "out" / "source.json").read_text()


@pytest.mark.parametrize(("begins_with_bos", "expected"), [(True, "<s>Why?"), (False, "Why?")])
def test_a_base_models_prompts_begin_as_its_texts_do(built: Built, begins_with_bos: bool, expected: str) -> None:
    model, _ = built(begins_with_bos=begins_with_bos)
    assert prompt(model) == expected
    texts = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert texts.encode(prompt(model), add_special_tokens=False).ids == texts.encode("Why?").ids


def test_a_models_own_template_is_left_alone(built: Built) -> None:
    model, _ = built(template=TEMPLATE)
    assert (model / "chat_template.jinja").read_text() == TEMPLATE


def test_the_tokenizer_cuts_and_fills_no_text(built: Built) -> None:
    model, _ = built(max_length=7)
    texts = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in ("x", "x" * 40):
        assert len(texts.encode(text).ids) == len(text) + 1
