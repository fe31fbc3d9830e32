import numpy as np
import pytest
from tokenizers import Tokenizer

from deploy.formats.bundle import Bundle
from deploy.formats.errors import BundleError
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.sampling import SamplingParams, sample
from deploy.runtime.session import Session, open_tokenizer
from deploy.runtime.tree import Draft


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.bundle(tmp_path_factory.mktemp("bundles") / "b"))


@pytest.fixture(scope="module")
def session(bundle):
    return Session.open(bundle, backend="reference-int8")


class Knowing(NoDrafter):
    """Drafts what the text will be, further than is asked for: an answer ends within its draft."""

    def __init__(self, text):
        self.text = text

    def propose(self, sequence, path, budget, sampling, sample_index):
        return Draft.chain(self.text[len(path) : len(path) + 3])


def options(max_tokens=20, stop=(), **sampling):
    return GenerationOptions(max_tokens, SamplingParams(**sampling), tuple(stop))


def slow_generate(bundle, prompt, count, params):
    """The whole text recomputed for every token."""
    tokens = list(prompt)
    for _ in range(count):
        rows = [Row(token, i, 0, i - 1) for i, token in enumerate(tokens)]
        logits = ReferenceBackend(bundle.model()).forward(rows).logits[-1]
        tokens.append(sample(logits, params, position=len(tokens), path=tokens))
        if tokens[-1] == 2:
            break
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.3, 40, 0.9, 0.01, 1.2, 5)])
def test_it_generates_what_recomputing_everything_generates(bundle, session, params):
    prompt = session.encode_chat([{"role": "user", "content": "Grüße!"}])
    result = session.generate(prompt, GenerationOptions(8, params))
    assert result.token_ids == slow_generate(bundle, prompt, 8, params)
    assert result.num_prompt_tokens == len(prompt)


def test_the_same_seed_gives_the_same_text_and_another_another(session):
    prompt = session.encode_raw("Once")
    first = session.generate(prompt, options(temperature=1.5, seed=3))
    session.generate(session.encode_raw("something else in between"), options(temperature=1.5))
    assert session.generate(prompt, options(temperature=1.5, seed=3)).token_ids == first.token_ids
    assert session.generate(prompt, options(temperature=1.5, seed=4)).token_ids != first.token_ids


def test_streamed_pieces_join_to_the_text(session):
    pieces = []
    result = session.generate(session.encode_raw("Once"), options(60, temperature=2.0, seed=1), pieces.append)
    assert "".join(pieces) == result.text
    assert all(pieces)
    ended = result.token_ids[-1] == 2
    assert result.finish_reason == ("eos" if ended else "length")
    assert result.text == session.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)


def test_an_answer_ends_with_the_token_after_which_it_is_said_to(session):
    prompt = session.encode_raw("one")
    whole = session.generate(prompt, options(40)).token_ids
    seen = []

    def ends(answer):
        seen.append(list(answer))
        return len(answer) == 13

    pieces = []
    text = session.tokenizer.decode(list(whole[:13]), skip_special_tokens=True)
    held_back = text[-1:] + "\0"  # a stop string that may still come when the answer ends
    result = session.generate(prompt, GenerationOptions(40, stop=(held_back,), ends=ends), pieces.append)
    assert result.token_ids == whole[:13]
    assert result.text == "".join(pieces) == text
    assert result.finish_reason == "stop"
    assert seen == [list(whole[:count]) for count in range(1, 14)]


def test_a_stop_string_ends_the_text_and_is_not_in_it(session):
    prompt = session.encode_raw("Once")
    whole = session.generate(prompt, options(60, temperature=2.0, seed=1)).text
    stop = whole[len(whole) // 2 :][:2]
    result = session.generate(prompt, options(60, stop=[stop], temperature=2.0, seed=1))
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]


def test_an_end_token_ends_the_text(session, monkeypatch):
    first = session.generate(session.encode_raw("Once"), options(1)).token_ids[0]
    monkeypatch.setattr(session, "_eos", frozenset([first]))
    result = session.generate(session.encode_raw("Once"), options(5))
    assert result.finish_reason == "eos"
    assert result.text == ""
    assert result.token_ids == (first,)


def test_a_long_prompt_is_prefilled_in_parts(bundle, session):
    prompt = session.encode_raw("x" * 110)
    assert session.generate(prompt, options(2)).token_ids == slow_generate(bundle, prompt, 2, SamplingParams())


def test_what_does_not_fit_the_context_is_refused_before_any_work(session):
    with pytest.raises(ValueError, match=r"110 tokens.*max_tokens=19.*context of 128"):
        session.generate(session.encode_raw("x" * 110), options(19))
    assert session.generate(session.encode_raw("x" * 126), options(2)).num_prompt_tokens == 126


def test_an_empty_prompt_is_refused(session):
    with pytest.raises(ValueError, match="no tokens"):
        session.generate([], options())


def test_special_tokens_of_the_template_are_tokens(session):
    tokens = session.encode_chat([{"role": "user", "content": "a"}])
    assert tokens[0] == 1
    assert 2 in tokens
    assert np.count_nonzero(np.array(tokens) == 1) == 2


def test_a_stop_text_that_is_no_tuple_is_refused():
    with pytest.raises(ValueError, match="stop='END' is one text"):
        GenerationOptions(4, stop="END")


def test_max_tokens_must_be_positive():
    with pytest.raises(ValueError, match="max_tokens=0"):
        GenerationOptions(0)


def test_a_tokenizer_that_does_not_load_is_refused_by_file(tmp_path, tiny):
    import json

    directory = tiny.bundle(tmp_path / "b")
    (directory / "tokenizer.json").write_text(json.dumps({"model": 3}))
    broken = Bundle(directory, Bundle.open(tiny.bundle(tmp_path / "c")).manifest)
    with pytest.raises(BundleError, match=r"tokenizer\.json: does not load"):
        Session.open(broken)


def test_many_requests_in_flight_give_what_each_gives_alone(session):
    texts = ["Once", "The end of it", "x" * 70, "7", "Ümlaut", "and so on and on"]
    requests = [
        Request(
            session.encode_raw(text), GenerationOptions(6 + index, SamplingParams(temperature=index / 2, seed=index))
        )
        for index, text in enumerate(texts)
    ]
    found = dict(session.generate_many(requests, num_sequences=3))
    assert sorted(found) == list(range(len(texts)))
    for index, request in enumerate(requests):
        alone = session.generate(request.prompt, request.options)
        assert (found[index].token_ids, found[index].text) == (alone.token_ids, alone.text)


def test_a_second_turn_reads_only_what_is_new(session):
    first = [{"role": "user", "content": "Hello"}]
    prompt = session.encode_chat(first)
    answer = session.generate(prompt, options(8, temperature=1.0, seed=2))
    longer = [*prompt, *answer.token_ids, *session.encode_raw(" and then?")]
    again = session.generate(longer, options(8, temperature=1.0, seed=2))
    assert again.num_cached_tokens == len(prompt) + len(answer.token_ids) - 1
    session.generate(session.encode_raw("in between"), options(2))
    assert session.generate(longer, options(8, temperature=1.0, seed=2)).token_ids == again.token_ids


def test_a_prompt_that_is_wholly_cached_gives_the_same_answer(session):
    prompt = session.encode_raw("Once upon a time")
    first = session.generate(prompt, options(10))
    assert session.generate(prompt[:3], options(10)).num_cached_tokens == 2
    assert session.generate(prompt, options(10)).token_ids == first.token_ids


def test_a_listener_that_fails_leaves_the_session_usable(session):
    prompt = session.encode_raw("Once upon a time")
    expected = session.generate(prompt, options(12)).token_ids

    def fail(_piece):
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        session.generate(session.encode_raw("Another"), options(12), fail)
    assert session.generate(prompt, options(12)).token_ids == expected


def test_an_interrupt_while_going_back_leaves_the_session_usable(session, monkeypatch):
    prompt = session.encode_raw("Once upon a time")
    expected = session.generate(prompt, options(12)).token_ids
    truncate = session.backend.truncate

    def interrupted(sequence, length):
        truncate(sequence, length)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.backend, "truncate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate(prompt[:3], options(12))
    monkeypatch.undo()
    assert session.generate(prompt, options(12)).token_ids == expected


def test_an_interrupt_as_an_answer_ends_within_a_draft_leaves_the_session_usable(session, monkeypatch):
    prompt = session.encode_raw("Once upon a time")
    expected = session.generate(prompt, options(12)).token_ids
    session.use(Knowing([*prompt, *expected]))
    truncate, lengths = session.backend.truncate, []

    def interrupted(sequence, length):
        truncate(sequence, length)
        lengths.append(length)
        if len(lengths) == 2:  # the first goes back to where prompts differ, the second behind the last token
            raise KeyboardInterrupt

    monkeypatch.setattr(session.backend, "truncate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate(prompt, options(7))
    monkeypatch.undo()
    assert lengths[1] == len(prompt) + 6
    longer = session.generate([*prompt, *expected[:7]], options(5))
    assert longer.token_ids == expected[7:]


def test_two_batches_at_once_are_refused_for_they_would_share_sequences(session):
    requests = [Request(session.encode_raw(text), options(5 + i)) for i, text in enumerate(("Once", "upon", "a time"))]
    expected = [session.generate(each.prompt, each.options).token_ids for each in requests]
    first, second = (session.generate_many(requests, num_sequences=2) for _ in range(2))
    found = [next(first)]
    with pytest.raises(RuntimeError, match="another generate_many of this session has not ended"):
        next(second)
    found += first
    assert [answer.token_ids for _, answer in sorted(found, key=lambda pair: pair[0])] == expected
    third = session.generate_many(requests)
    next(third)
    third.close()
    assert [answer.token_ids for _, answer in sorted(session.generate_many(requests))] == expected


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800 x"])
def test_text_that_is_not_unicode_is_refused(session, text):
    with pytest.raises(ValueError, match=r"the prompt is not Unicode text: .* half of a surrogate pair"):
        session.encode_raw(text)
    with pytest.raises(ValueError, match="not Unicode text"):
        session.encode_chat([{"role": "user", "content": text}])


def test_a_prompt_is_whole_whatever_length_the_tokenizer_was_trained_with(tmp_path, tiny, session):
    directory = tiny.bundle(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(directory / "tokenizer.json"))
    opened = open_tokenizer(Bundle(directory, Bundle.open(tiny.bundle(tmp_path / "c")).manifest), vocab_size=263)
    for text in ("x", "x" * 40):
        assert opened.encode(text).ids == session.encode_raw(text)
