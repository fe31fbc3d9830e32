import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.runtime.text import IncrementalDecoder, StopFilter


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
