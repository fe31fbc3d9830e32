"""A GGUF's tokenizer: any text survives, and texts are cut as the models' own tokenizers cut them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from compress.target.gguf_source import GgufFile
from compress.target.gguf_tokenizer import PRE_TOKENIZERS, byte_level_bpe, tokenizer_config

PRES = sorted(PRE_TOKENIZERS)


def metadata(tiny: Any, pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    tokens = tiny.vocabulary()
    kinds = [3 if token in tiny.special else 1 for token in tokens]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": list(tiny.merges)}
    return fields | changes


def pieces(pre: str, text: str) -> list[str]:
    """The words before merging, spaces shown as they are."""
    cut = PRE_TOKENIZERS[pre].cut().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize("pre", PRES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives(tiny: Any, pre: str, text: str) -> None:
    tokenizer = byte_level_bpe(metadata(tiny, pre))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # A special token's name in the text would be that token; none can come from single characters of this alphabet.
    kept = normalizers.NFC().normalize_str(text) if pre == "qwen2" else text
    assert tokenizer.decode(ids, skip_special_tokens=False) == kept


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # Worked out by hand from the rules in the models' tokenizer.json.
        ("smollm", "a 1234's", ["a", " ", "1", "2", "3", "4", "'s"]),
        ("smollm", "the  x\n\ny", ["the", " ", " x", "\n", "\n", "y"]),
        ("starcoder", "x=10", ["x", "=", "1", "0"]),
        ("gpt-2", "a 1234's", ["a", " 1234", "'s"]),
        ("gpt-2", "IT'S", ["IT", "'", "S"]),
        ("llama-bpe", "a 1234567's", ["a", " ", "123", "456", "7", "'s"]),
        ("llama-bpe", "IT'S (x)", ["IT", "'S", " (", "x", ")"]),
        ("llama3", "f(x)\n\n  y", ["f", "(x", ")\n\n", " ", " y"]),
        ("qwen2", "a 123's", ["a", " ", "1", "2", "3", "'s"]),
        ("qwen2", "über_2", ["über", "_", "2"]),
    ],
)
def test_each_kind_cuts_texts_as_its_models_do(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


def transformers_pattern(pre: str) -> str:
    """The rule as transformers states it for its own conversions."""
    if pre == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        return str(PRETOKENIZE_REGEX)
    from transformers.convert_slow_tokenizer import TikTokenConverter

    return str(TikTokenConverter().pattern)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "llama3"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aB'sTé日1234567 .,-(_\n\r\t\u3000"), max_size=40))
def test_texts_are_cut_where_transformers_cuts_them(pre: str, text: str) -> None:
    theirs = pre_tokenizers.Split(Regex(transformers_pattern(pre)), behavior="isolated").pre_tokenize_str(text)
    assert pieces(pre, text) == [piece for piece, _ in theirs]


@pytest.mark.parametrize("pre", PRES)
def test_cutting_keeps_every_character(pre: str) -> None:
    text = "Don't  stop — 12345 日本語\r\n\tx=[1,2];  "
    assert "".join(pieces(pre, text)) == text


def test_merges_apply_in_their_order(tiny: Any) -> None:
    tokenizer = byte_level_bpe(metadata(tiny))
    assert tokenizer.encode("hello the").tokens == ["hello", "Ġthe"]
    assert tokenizer.encode("hell").tokens == ["hell"]


def test_digits_never_merge_for_smollm_although_the_merges_exist(tiny: Any) -> None:
    assert byte_level_bpe(metadata(tiny, "smollm")).encode("1234").tokens == ["1", "2", "3", "4"]
    assert byte_level_bpe(metadata(tiny, "gpt-2")).encode("1234").tokens == ["1234"]
    assert byte_level_bpe(metadata(tiny, "llama-bpe")).encode("1234").tokens == ["123", "4"]


@pytest.mark.parametrize(
    ("pre", "expected"), [("llama-bpe", ["zebra"]), ("llama3", ["zebra"]), ("qwen2", list("zebra"))]
)
def test_a_word_of_the_vocabulary_that_no_merge_makes_is_a_token_where_llama_3_has_it_so(
    tiny: Any, pre: str, expected: list[str]
) -> None:
    fields = metadata(tiny, pre)
    fields |= {"tokens": [*fields["tokens"], "zebra"], "token_type": [*fields["token_type"], 1]}
    assert byte_level_bpe(fields).encode("zebra").tokens == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("he ltoaeAu\u0301\u0308\u0323\u1100\u1161é日1"), max_size=30))
def test_qwens_texts_have_the_tokens_that_transformers_gives_them(tiny: Any, text: str) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    fields = metadata(tiny, "qwen2")
    merges: Any = [tuple(merge.split(" ")) for merge in tiny.merges]
    theirs = Qwen2Tokenizer({token: index for index, token in enumerate(fields["tokens"])}, merges)
    assert byte_level_bpe(fields).encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_special_tokens_are_one_token_each_and_can_be_skipped(tiny: Any) -> None:
    tokenizer = byte_level_bpe(metadata(tiny))
    tokens = tiny.vocabulary()
    encoded = tokenizer.encode("<|im_start|>he<|im_end|>")
    assert encoded.ids == [tokens.index(token) for token in ("<|im_start|>", "he", "<|im_end|>")]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "he"
    assert tokenizer.get_vocab_size() == len(tokens)


def test_user_defined_tokens_are_one_token_and_are_not_skipped(tiny: Any) -> None:
    tokens = [*tiny.vocabulary(), "<tool>"]
    kinds = [3 if token in tiny.special else 4 if token == "<tool>" else 1 for token in tokens]
    tokenizer = byte_level_bpe(metadata(tiny, tokens=tokens, token_type=kinds))
    encoded = tokenizer.encode("x<tool>y")
    assert encoded.tokens == ["x", "<tool>", "y"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "x<tool>y"


def test_an_unknown_kind_is_refused_with_those_that_are_known(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre='chaos' is not known \(known: gpt-2, llama-bpe"):
        byte_level_bpe(metadata(tiny, "chaos"))


def test_a_file_without_a_kind_is_cut_like_gpt_2(tiny: Any) -> None:
    fields = metadata(tiny)
    del fields["pre"]
    assert byte_level_bpe(fields).encode("1234").tokens == ["1234"]


def test_the_configuration_names_special_tokens_by_their_text(tiny: Any) -> None:
    tokens = tiny.vocabulary()
    ids = {"bos_token_id": tokens.index("<|im_start|>"), "eos_token_id": tokens.index("<|im_end|>")}
    config = tokenizer_config(metadata(tiny, **ids, add_bos_token=True))
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert config["add_bos_token"] is True
    assert "unk_token" not in config
    padded = tokenizer_config(metadata(tiny, **ids, padding_token_id=tokens.index("<|endoftext|>")))
    assert padded["pad_token"] == "<|endoftext|>"


# Its vocabulary lacks the bytes of some control characters and of unassigned planes; those it drops.
@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=120))
def test_the_embedded_models_tokenizer_keeps_any_written_text(real_tokenizer: Any, text: str) -> None:
    ids = real_tokenizer.encode(text, add_special_tokens=False).ids
    assert real_tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def real_tokenizer(tiny: Any) -> Any:
    return byte_level_bpe(GgufFile(tiny.embedded_file()).tokenizer_metadata())


@pytest.mark.slow
def test_the_embedded_models_tokenizer_cuts_as_its_published_one_does(real_tokenizer: Any) -> None:
    # HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer.json: digits alone, then byte-level with GPT-2's rule.
    encoded = real_tokenizer.encode("<|im_start|>user\nWhat is 12+30?<|im_end|>\n")
    assert [real_tokenizer.decode([i], skip_special_tokens=False) for i in encoded.ids] == [
        *("<|im_start|>", "user", "\n", "What", " is", " ", "1", "2", "+", "3", "0", "?", "<|im_end|>", "\n")
    ]
