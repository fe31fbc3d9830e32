"""The speculators form of an EAGLE-3 head: written, read back, and refused when anything is not as documented."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy.formats.architectures import Llama3Scaling, ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Owner
from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, from_bfloat16, to_bfloat16, write_safetensors
from deploy.formats.speculators import EagleDirectory, write_eagle

DIGEST = "0123456789abcdef" * 4
OWNER = Owner(DIGEST, {"config.json": DIGEST, "model.safetensors": "f" * 64}, DIGEST, "a" * 64)


@pytest.fixture
def target(tiny):
    return ModelShape.from_config(tiny.config())


@pytest.fixture
def write(tiny, target):
    def make(path, shape=target, **choices):
        return tiny.head(path, shape, OWNER, **choices)

    return make


def rewrite(path, **changes):
    """The weights file again with tensors replaced, or dropped where None is given."""
    with SafetensorsFile(path / "model.safetensors") as file:
        tensors: dict[str, Any] = {}
        for name in file.names():
            values = file.array(name).copy()
            tensors[name] = BFloat16(values) if file.dtype(name) == "BF16" else values
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    write_safetensors(path / "model.safetensors", tensors)


def edit(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("layers", [(0, 1, 2), (2,)])
@pytest.mark.parametrize("embedding", ["reference", "copy"])
def test_what_was_written_is_read_back_rounded_to_bfloat16(tmp_path, target, layers, embedding, write, tiny):
    config, weights, ids = write(
        tmp_path, target, feature_layers=layers, embedding=embedding, norm_before_residual=False
    )
    with EagleDirectory.open(tmp_path, target) as head:
        assert head.config == config
        assert head.owner == OWNER
        assert head.training == tiny.training_record()
        assert np.array_equal(head.draft_ids, ids)
        found = head.weights()
    assert set(found) == set(weights)
    assert ("embed_tokens.weight" in found) == (embedding == "copy")
    for name, values in weights.items():
        assert np.array_equal(found[name], from_bfloat16(to_bfloat16(values))), name


def test_other_programs_read_the_same_weights_and_maps(tmp_path, target, write):
    _, weights, ids = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensors[name], torch.from_numpy(values).bfloat16()) for name, values in weights.items())
    target_ids = [draft + int(offset) for draft, offset in enumerate(tensors["d2t"])]
    assert target_ids == [token for token in range(target.vocab_size) if tensors["t2d"][token]] == ids.tolist()


def test_the_decoder_layer_is_a_configuration_that_transformers_reads(tmp_path, target, write):
    from transformers import LlamaConfig

    scaled = replace(target, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))
    write(tmp_path, scaled)
    raw = json.loads((tmp_path / "config.json").read_text())
    theirs = LlamaConfig(**raw["transformer_layer_config"])
    assert (theirs.hidden_size, theirs.head_dim, theirs.vocab_size) == (96, 16, 263)
    assert theirs.num_hidden_layers == 1
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["rope_type"] == "llama3"
    assert raw["architectures"] == ["Eagle3Speculator"]
    assert raw["norm_before_residual"] is True
    assert raw["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert EagleDirectory.open(tmp_path, scaled).config.layer.rope_scaling == scaled.rope_scaling


def test_the_same_head_gives_the_same_bytes(tmp_path, write):
    for name in ("a", "b"):
        write(tmp_path / name)
    for name in ("config.json", "model.safetensors", "training.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_parameters_are_counted_without_the_targets_embedding(tmp_path, target, write):
    _, weights, _ = write(tmp_path, embedding="copy")
    own = sum(values.size for name, values in weights.items() if name != "embed_tokens.weight")
    assert EagleDirectory.open(tmp_path, target).num_parameters() == own


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"draft_vocab_size": 264}, "draft_vocab_size=264 is not in 1 … 263, the target's vocabulary"),
        ({"draft_vocab_size": 0}, "draft_vocab_size=0"),
        ({"feature_layers": (0, 1, 3)}, r"layer_ids=\[0, 1, 3\] must ascend and lie in 0 … 2"),
        ({"feature_layers": (1, 1)}, "must ascend"),
        ({"feature_layers": ()}, "must ascend"),
        ({"feature_layers": (-1, 1)}, "lie in 0 … 2"),
    ],
)
def test_a_head_that_the_target_cannot_have_is_refused(tiny, target, choices, message):
    with pytest.raises(FormatError, match=message):
        EagleConfig.for_target(target, **(tiny.HEAD | choices))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 192}, "hidden_size=96, but the target's is 192"),
        ({"vocab_size": 264}, "vocab_size=263, but the target's is 264"),
        ({"model_type": "qwen2"}, "for a llama model, and the target is a qwen2"),
        ({"num_layers": 1}, "lie in 0 … 1"),
        ({"context_length": 4096}, "the head's context of 128 tokens is shorter than the target's of 4096"),
    ],
)
def test_a_head_of_another_shape_of_target_is_refused(tmp_path, target, changes, message, write):
    write(tmp_path)
    with pytest.raises(FormatError, match=message):
        EagleDirectory.open(tmp_path, replace(target, **changes))


def test_a_head_of_another_target_or_tokenizer_is_refused_with_the_remedy():
    files, tokenizer, template = OWNER.model_files, OWNER.tokenizer, OWNER.chat_template
    OWNER.check(files, tokenizer, template)
    with pytest.raises(FormatError, match=r"another target: model\.safetensors was ffff.*, is 0123.*; train a head"):
        OWNER.check({**files, "model.safetensors": DIGEST}, tokenizer, template)
    with pytest.raises(FormatError, match=r"another target: model-2\.safetensors was none"):
        OWNER.check({**files, "model-2.safetensors": DIGEST}, tokenizer, template)
    with pytest.raises(FormatError, match=r"another tokenizer: tokenizer\.json was 0123.*, is bbbb.*; train a head"):
        OWNER.check(files, "b" * 64, template)
    with pytest.raises(FormatError, match=r"another chat template: it was aaaa.*; train a head"):
        OWNER.check(files, tokenizer, "b" * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": None}, r"tensors missing: fc\.weight; unknown: none"),
        ({"fc.bias": np.zeros(96, np.float32)}, r"tensors missing: none; unknown: fc\.bias"),
        ({"embed_tokens.weight": BFloat16(np.zeros((263, 96), np.uint16))}, r"unknown: embed_tokens\.weight"),
        ({"norm.weight": np.zeros(96, np.float32)}, r"'norm\.weight' is F32 \[96\], expected BF16 \[96\]"),
        ({"norm.weight": BFloat16(np.zeros(95, np.uint16))}, r"'norm\.weight' is BF16 \[95\], expected BF16 \[96\]"),
        ({"d2t": np.zeros(37, np.int32)}, r"'d2t' is I32 \[37\], expected I64"),
        ({"d2t": np.zeros(37, np.int64)}, r"d2t and t2d name different draft vocabularies \(37 ids, 37 marks\)"),
        ({"d2t": np.full(37, 2**62, np.int64)}, "d2t and t2d name different draft vocabularies"),
        ({"t2d": np.ones(263, np.bool_)}, r"d2t and t2d name different draft vocabularies \(37 ids, 263 marks\)"),
    ],
)
def test_tensors_that_are_not_as_documented_are_refused_by_name(tmp_path, target, changes, message, write):
    write(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        EagleDirectory.open(tmp_path, target)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_weight_that_is_not_finite_is_refused_when_read_and_when_written(tmp_path, target, write, tiny):
    config, weights, ids = write(tmp_path)
    bits = np.zeros(96, np.uint16)
    bits[3] = 0x7FC0
    rewrite(tmp_path, **{"norm.weight": BFloat16(bits)})
    head = EagleDirectory.open(tmp_path, target)
    with pytest.raises(
        FormatError, match=r"model\.safetensors: tensor 'norm\.weight' holds values that are not finite"
    ):
        head.weights()
    weights["fc.weight"][1, 1] = np.inf
    with pytest.raises(FormatError, match=r"'fc\.weight' holds values that are not finite"):
        write_eagle(tmp_path / "new", config, weights, ids, OWNER, tiny.training_record())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [np.arange(36), np.arange(37)[::-1], np.arange(37) + 230, np.arange(37) - 1])
def test_ids_that_are_no_draft_vocabulary_are_not_written(tmp_path, wrong, write, tiny):
    config, weights, _ = write(tmp_path / "sound")
    with pytest.raises(FormatError, match="37 ascending ids below 263"):
        write_eagle(tmp_path / "new", config, weights, wrong.astype(np.int64), OWNER, tiny.training_record())


CONFIG_DAMAGE = [
    (lambda c: c.pop("norm_before_residual"), "keys missing: norm_before_residual; unknown: none"),
    (lambda c: c.update(has_bias=True), "unknown: has_bias"),
    (lambda c: c.update(norm_before_residual="yes"), "norm_before_residual='yes' is neither"),
    (lambda c: c.update(draft_vocab_size=True), "draft_vocab_size=True is not a count"),
    (lambda c: c.update(target_hidden_size=64), "target_hidden_size=64 differs"),
    (lambda c: c.update(speculators_model_type="eagle"), "speculators_model_type='eagle' is not supported"),
    (lambda c: c.update(eagle_aux_hidden_state_layer_ids="all"), "ids='all' is not a list of layers"),
    (lambda c: c.update(transformer_layer_config=[]), "transformer_layer_config is not an object"),
    (
        lambda c: c["transformer_layer_config"].update(num_hidden_layers=2),
        "is 2 layers of 'llama'; supported: 1 of llama",
    ),
    (lambda c: c["transformer_layer_config"].update(hidden_act="gelu"), "hidden_act='gelu'"),
    (lambda c: c["speculators_config"].update(algorithm="eagle"), "is not a greedy eagle3 proposal"),
    (lambda c: c["speculators_config"]["verifier"].update(architectures=["GPT"]), "for one of llama, qwen2"),
    (lambda c: c.update(speculators_config=None), "speculators_config=None"),
    (lambda c: c.update(understudy={"embedding": "borrowed"}), r"is not \{'embedding': reference \| copy\}"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_DAMAGE)
def test_a_configuration_that_is_not_as_documented_is_refused(tmp_path, target, change, message, write):
    write(tmp_path)
    edit(tmp_path, "config.json", change)
    with pytest.raises(FormatError, match=message) as caught:
        EagleDirectory.open(tmp_path, target)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("training"), "training is not an object of cost_ratio, data"),
        (lambda r: r["training"].pop("mbsu"), "training is not an object of cost_ratio, data"),
        (lambda r: r["training"].update(tokens=-1), "training.tokens=-1 is not a number of 0 or more"),
        (lambda r: r["training"].update(seconds=float("nan")), "training.seconds=nan is not a number"),
        (lambda r: r["training"].update(served_form=8), "training.served_form=8 is not of type str"),
        (lambda r: r["training"].update(plain=None), "training.plain=None is not"),
        (lambda r: r["training"]["served"].update(by_position=[1.5]), r"served\.by_position=\[1\.5\] is not a list of"),
        (lambda r: r["training"]["served"].update(by_position=[]), r"by_position=\[\] is not a list of shares"),
        (lambda r: r.update(target=None), "target.files is missing"),
        (lambda r: r["target"].update(content="mine"), "target.content='mine' is not a sha256"),
        (lambda r: r["target"]["files"].update({"config.json": 3}), r"files\['config.json'\]=3 is not a sha256"),
        (lambda r: r.update(tokenizer=None), "tokenizer=None is not a sha256"),
    ],
)
def test_a_record_that_is_not_as_documented_is_refused(tmp_path, target, change, message, write):
    write(tmp_path)
    edit(tmp_path, "training.json", change)
    with pytest.raises(FormatError, match=message) as caught:
        EagleDirectory.open(tmp_path, target)
    assert str(tmp_path / "training.json") in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_missing_file_is_named(tmp_path, target, name, write):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=name):
        EagleDirectory.open(tmp_path, target)
