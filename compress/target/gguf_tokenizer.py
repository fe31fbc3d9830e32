"""A GGUF file's byte-level BPE tokenizer as a `tokenizers` object.

transformers converts GGUF tokenizers too, but drops the pre-tokenizer's rule (`tokenizer.ggml.pre`), so that digits
and punctuation are cut differently from the way the model learnt them, and maps the special tokens wrongly. The rules
below are those that the models' own tokenizer.json files state; llama.cpp's `llm_tokenizer_bpe` lists the same ones.

What a file says nothing of follows from its kind too. Llama 3 takes a word that is in the vocabulary as it is, whatever
the merges make of it (transformers' TikTokenConverter sets ignore_merges beside Llama 3's rule). Qwen 2 and 3 compose
characters first (transformers' Qwen2Tokenizer has the normalizer NFC, and Qwen 3 the same tokenizer).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4
"""Token types of the GGUF specification that take part in special-token splitting."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@dataclass(frozen=True)
class PreTokenizer:
    """How the models of a kind cut a text into words.

    cut: makes what cuts. composes: whether characters are composed first (Unicode's NFC). keeps_words: whether a word
    that is in the vocabulary is one token even where no merges lead there.
    revision: raised when the tokenizers of this kind change; above 0 it is part of the target's key.
    """

    cut: Callable[[], pre_tokenizers.PreTokenizer]
    composes: bool = False
    keeps_words: bool = False
    revision: int = 0


_LLAMA3_KIND = PreTokenizer(lambda: _split(_LLAMA3), keeps_words=True, revision=1)
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(_digits_then_bytes),
    "starcoder": PreTokenizer(_digits_then_bytes),
    "gpt-2": PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": _LLAMA3_KIND,
    "llama3": _LLAMA3_KIND,
    "qwen2": PreTokenizer(lambda: _split(_QWEN2), composes=True, revision=1),
}


def pre_tokenizer_name(metadata: dict[str, Any]) -> str:
    """`tokenizer.ggml.pre`; old files lack it, and are cut like GPT-2's."""
    return str(metadata.get("pre", "gpt-2"))


def byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    metadata: the file's `tokenizer.ggml.*` fields without that prefix; `model` must be "gpt2" (byte-level BPE).
    Raises ValueError when the pre-tokenizer is not one of `PRE_TOKENIZERS`.
    """
    pre = pre_tokenizer_name(metadata)
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r} is not known (known: {known}); use the model's Hugging Face directory instead"
        )
    tokens, types = metadata["tokens"], metadata["token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    rules = PRE_TOKENIZERS[pre]
    model = models.BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False, ignore_merges=rules.keeps_words)
    tokenizer = Tokenizer(model)
    if rules.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules.cut()
    tokenizer.decoder = decoders.ByteLevel()
    for special, kind in ((True, CONTROL), (False, USER_DEFINED)):
        texts = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
        added = [AddedToken(text, special=special, normalized=False) for text in texts]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's content: special tokens by name and whether a text starts with the bos token."""
    tokens = metadata["tokens"]
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
    special = {name: tokens[metadata[key]] for name, key in names.items() if metadata.get(key) is not None}
    padding = metadata.get("padding_token_id")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        **special,
        "pad_token": tokens[padding] if padding is not None else special.get("eos_token"),
    }
