import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from deploy.runtime.text import IncrementalDecoder, StopFilter, whole_text


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_pieces_join_to_the_text_and_are_whole_characters(tiny, text):
    tokenizer = tiny.tokenizer()
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_a_character_appears_when_its_last_byte_does(tiny):
    tokenizer = tiny.tokenizer()
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("a€b").ids] == ["a", "", "", "€", "b"]


@given(st.lists(st.integers(0, 258), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_tokens_even_broken_ones_join_to_the_whole_decoding(tiny, tokens):
    tokenizer = tiny.tokenizer()
    decoder = IncrementalDecoder(tokenizer)
    pieces = "".join(decoder.push(token) for token in tokens) + decoder.flush()
    assert pieces == tokenizer.decode(tokens, skip_special_tokens=True)


def fallback_tokenizer():
    """As SentencePiece's: bytes for what it has no token for, and a decoder that replaces whole runs of them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁Hi"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def in_pieces(tokenizer, tokens):
    decoder = IncrementalDecoder(tokenizer)
    return "".join([*map(decoder.push, tokens), decoder.flush()])


def tokens_of(*parts):
    """Bytes, and names of tokens."""
    tokenizer = fallback_tokenizer()
    return [
        token
        for part in parts
        for token in ([1 + byte for byte in part] if isinstance(part, bytes) else [tokenizer.token_to_id(part)])
    ]


@pytest.mark.parametrize("end", [[], ["a"]])
def test_a_complete_character_stays_beside_an_incomplete_one(end):
    tokens = tokens_of("▁Hi", "你".encode(), "好".encode()[:1], *end)
    text = "Hi你\ufffd" + "".join(end)
    assert in_pieces(fallback_tokenizer(), tokens) == text
    assert whole_text(fallback_tokenizer(), tokens) == text


PARTS = st.sampled_from(["▁", "a", "▁Hi", "你".encode(), "é".encode(), "你".encode()[:2], b"\xff", b"\xa0"])


@given(st.lists(PARTS, max_size=9))
@settings(max_examples=300, deadline=None)
def test_the_whole_text_is_the_pieces_and_where_nothing_is_broken_the_decoding(parts):
    tokenizer, tokens = fallback_tokenizer(), tokens_of(*parts)
    decoded = tokenizer.decode(tokens)
    found = whole_text(tokenizer, tokens)
    assert found == in_pieces(tokenizer, tokens)
    assert "\ufffd" in decoded or found == decoded


@given(
    st.lists(st.text(alphabet="ab-", max_size=4), max_size=12),
    st.lists(st.text(alphabet="ab-", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string_however_it_arrives(pieces, stops):
    whole = "".join(pieces)
    stop_filter, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stop_filter.push(piece)
        assert not any(stop in shown for stop in stops)
        if stop_filter.is_stopped:
            break
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert stop_filter.is_stopped == bool(ends)
    if not ends:
        assert shown + stop_filter.flush() == whole
    else:
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)


def test_text_that_cannot_become_a_stop_string_is_shown_at_once():
    stop_filter = StopFilter(["STOP"])
    assert stop_filter.push("say ST") == "say "
    assert stop_filter.push("ILL") == "STILL"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop=''"):
        StopFilter(["x", ""])
