"""Rates from answers, and times by rows. No test here looks at a clock."""

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import Generation, GenerationOptions
from deploy.runtime.machine import cpu_field, describe_machine
from deploy.runtime.measure import ROW_COUNTS, answer_all, summarize, time_rows
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.session import Session


def answer(tokens, prefill, decode):
    return Generation("", tuple(range(tokens)), "length", 10, 0, prefill, decode)


def record(category):
    return PromptRecord("1", category, ("a",))


def test_rates_count_what_they_say():
    """Decoding leaves the first token out, which the prefill gives; end to end is all tokens over all time."""
    answers = [(record("a"), answer(11, 0.5, 2.0)), (record("b"), answer(41, 1.5, 2.0)), (record("a"), answer(5, 1, 1))]
    found = summarize(answers)
    assert found["tokens"] == found["rounds"] == 57
    assert found["decode_tok_s"] == pytest.approx((10 + 40 + 4) / 5, abs=0.01)
    assert found["e2e_tok_s"] == pytest.approx(57 / 8, abs=0.01)
    assert found["ttft_ms"] == 1000
    assert found["peak_rss_mb"] > 1
    assert list(found["by_category"]) == ["a", "b"]
    assert found["by_category"]["a"]["tokens"] == 16
    assert found["by_category"]["b"]["ttft_ms"] == 1500


def test_answers_of_one_token_have_no_decoding_rate():
    found = summarize([(record("a"), answer(1, 0.5, 1e-6))])
    assert found["decode_tok_s"] is None
    assert found["e2e_tok_s"] == pytest.approx(2, abs=0.01)


def test_every_row_count_is_timed_and_nothing_is_left_in_the_cache(tmp_path, tiny):
    """A context of 128 has no room for 128 tokens and 16 rows; a vocabulary of 97 none for the ids 100 and up."""
    backend = CpuBackend(tiny.model(tmp_path / "m", tiny.config(vocab_size=97), tiny.Quantized()))
    times = time_rows(backend)
    assert list(times) == [str(count) for count in ROW_COUNTS]
    assert all(milliseconds > 0 for milliseconds in times.values())
    assert backend.length(0) == 0


def test_a_context_too_short_for_some_row_counts_leaves_them_out(tmp_path, tiny):
    backend = CpuBackend(tiny.model(tmp_path / "m", tiny.config(max_position_embeddings=9), tiny.Quantized()))
    assert list(time_rows(backend)) == ["1", "2", "4", "6", "8"]


def test_conversations_are_answered_turn_by_turn(tmp_path, tiny):
    session = Session.open(Bundle.open(tiny.bundle(tmp_path / "b")))
    records = [PromptRecord("x", "a", ("Hi", "So")), PromptRecord("y", "b", ("Hi",))]
    ticks = []
    answers = answer_all(session, records, GenerationOptions(3), lambda: ticks.append(1))
    assert [each.identity for each, _ in answers] == ["x", "x", "y"]
    assert len(ticks) == 3
    assert answers[0][1].token_ids == answers[2][1].token_ids
    assert answers[1][1].num_prompt_tokens > answers[0][1].num_prompt_tokens
    with pytest.raises(ValueError, match=r"prompt 'long': .* exceeds the model's context"):
        answer_all(session, [PromptRecord("long", "a", ("x" * 200,))], GenerationOptions(3))


def test_the_machine_is_described_with_and_without_a_native_runtime(tmp_path, tiny):
    backend = CpuBackend(tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized()), threads=2)
    found = describe_machine(backend.runtime)
    assert (found["isa"], found["threads"]) == (backend.runtime.isa, 2)
    none = describe_machine(None)
    assert (none["isa"], none["threads"]) == (None, None)
    assert set(found) == set(none) == {"cpu", "family_model", "cores", "isa", "threads", "load_average"}
    assert cpu_field("no such field") == ""
