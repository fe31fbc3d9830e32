from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from deploy.formats.errors import FormatError
from deploy.formats.tokenizer import load_tokenizer, special_ids


@pytest.fixture
def trained(tmp_path) -> Path:
    """A tokenizer.json as training leaves it, with its length and its padding."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "<pad>": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.add_tokens([AddedToken("ab", special=False)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5, pad_id=3, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_are_encoded_whole_and_as_long_as_they_are(trained):
    tokenizer = load_tokenizer(trained)
    assert tokenizer.encode("a b " * 17).ids == [1, 2] * 17
    assert [found.ids for found in tokenizer.encode_batch(["a", "a b b"])] == [[1], [1, 2, 2]]


def test_special_tokens_are_those_that_are_no_text(trained):
    assert special_ids(load_tokenizer(trained)) == {3}


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_file_that_does_not_load_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json: does not load: "):
        load_tokenizer(tmp_path / "tokenizer.json")
