"""tokenizer.json, read for whole texts."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from deploy.formats.errors import FormatError


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which encodes every text whole and as long as it is.

    The file may state the truncation and padding of the training that wrote it, and the package would apply them to
    every text without a word. Raises FormatError naming the file when it does not load.
    """
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise FormatError(f"{path}: does not load: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that are no text: what a reader of an answer is not shown."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)
