"""Rates and counts from answers. No test here looks at a clock."""

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.machine import cpu_field, describe_machine
from deploy.runtime.measure import acceptance_json, answer_all, count_identical, counts_of, rates, round_parts
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.session import Session
from deploy.runtime.speculation import Speculation


def answer(tokens, prefill, decode, counts=None):
    counts = counts or Speculation(rounds=tokens, emitted=tokens)
    return Generation("", tuple(range(tokens)), "length", 10, 0, prefill, decode, counts)


def test_rates_count_what_they_say():
    """Decoding leaves the first token out, which the prefill gives; end to end is all tokens over all time."""
    found = rates([[answer(11, 0.5, 2.0), answer(41, 1.5, 2.0), answer(5, 1, 1)]])
    assert found["tokens"] == found["rounds"] == 57
    assert found["decode_tok_s"] == pytest.approx((10 + 40 + 4) / 5, abs=0.01)
    assert found["e2e_tok_s"] == pytest.approx(57 / 8, abs=0.01)
    assert found["ttft_ms"] == 1000


def test_an_answers_times_are_the_medians_over_the_passes():
    passes = [[answer(11, 1, 2), answer(6, 1, 9)], [answer(11, 9, 1), answer(6, 1, 1)], [answer(11, 2, 4)] * 2]
    passes[2][1] = answer(6, 1, 3)
    found = rates(passes)
    assert found["decode_tok_s"] == pytest.approx(15 / (2 + 3), abs=0.01)
    assert found["e2e_tok_s"] == pytest.approx(17 / (2 + 3 + 2 + 1), abs=0.01)
    assert (found["rounds"], found["tokens"]) == (17, 17)


def test_answers_of_one_token_have_no_decoding_rate_and_no_rounds():
    found = rates([[answer(1, 0.5, 1e-6)]])
    assert found["decode_tok_s"] is None
    assert found["e2e_tok_s"] == pytest.approx(2, abs=0.01)
    assert round_parts([[answer(1, 0.5, 1e-6)]]) is None


def test_acceptance_leaves_the_forward_out_that_reads_the_prompt():
    """11 tokens in 6 rounds, the first of which gave one: 10 in 5 rounds of two drafted tokens."""
    counts = Speculation(6, 11, drafted=10, levels=10, reached=[5, 4], accepted=[4, 1])
    found = acceptance_json(counts_of([[answer(11, 1, 1, counts)], [answer(11, 1, 1, counts)]]))
    assert found == {
        "tau": 2.0,
        "acceptance_by_position": [0.8, 0.25],
        "survival": [0.8, 0.2],
        "nodes_per_round": 2.0,
        "levels_per_round": 2.0,
    }


def test_a_rounds_time_is_divided_among_its_parts():
    counts = Speculation(5, 9, draft_seconds=0.4, verify_seconds=1.2)
    parts = round_parts([[answer(9, 1, 2.0, counts)]])
    assert parts == {"draft": pytest.approx(100), "verify": pytest.approx(300), "other": pytest.approx(100)}


def test_identical_answers_are_counted_in_every_pass():
    plain = [answer(3, 1, 1), answer(4, 1, 1)]
    assert count_identical([plain, [answer(3, 1, 1), answer(5, 1, 1)]], plain) == {"same": 3, "total": 4}


def test_conversations_are_answered_turn_by_turn(tmp_path, tiny):
    session = Session.open(Bundle.open(tiny.bundle(tmp_path / "b")))
    records = [PromptRecord("x", "a", ("Hi", "So")), PromptRecord("y", "b", ("Hi",))]
    ticks = []
    answers = answer_all(session, records, GenerationOptions(3), lambda: ticks.append(1))
    assert [each.record.identity for each in answers] == ["x", "x", "y"]
    assert len(ticks) == 3
    assert answers[0].result.token_ids == answers[2].result.token_ids
    assert answers[1].result.num_prompt_tokens == len(answers[1].prompt) > len(answers[0].prompt)
    with pytest.raises(ValueError, match=r"prompt 'long': .* exceeds the model's context"):
        answer_all(session, [PromptRecord("long", "a", ("x" * 200,))], GenerationOptions(3))


def test_a_text_given_as_tokens_is_continued_as_it_is(tmp_path, tiny):
    session = Session.open(Bundle.open(tiny.bundle(tmp_path / "b")))
    tokens = tuple(session.encode_raw("Once upon"))
    (found,) = answer_all(session, [PromptRecord("x", "a", (), tokens)], GenerationOptions(5))
    assert found.prompt == tokens
    assert found.result.token_ids == session.generate(tokens, GenerationOptions(5)).token_ids


def test_the_machine_is_described_with_and_without_a_native_runtime(tmp_path, tiny):
    backend = CpuBackend(tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized()), threads=2)
    found = describe_machine(backend.runtime)
    assert (found["isa"], found["threads"]) == (backend.runtime.isa, 2)
    none = describe_machine(None)
    assert (none["isa"], none["threads"]) == (None, None)
    assert set(found) == set(none) == {"cpu", "family_model", "cores", "isa", "threads", "load_average"}
    assert cpu_field("no such field") == ""
