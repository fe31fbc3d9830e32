"""Ours and llama.cpp side by side: both are counted by one convention, and mistakes are found before the work."""

import json
import sys

import pytest

from benchmarks import speculative
from deploy.runtime.speculation import Speculation
from tests.deploy.conftest import Tiny


def test_both_sides_leave_the_forward_out_that_reads_the_prompt():
    """11 tokens in 6 forwards, the first of which gave one: 10 in 5 rounds of two drafted tokens."""
    counts = Speculation(6, 11, 10, 10, reached=[5, 4], accepted=[4, 1], draft_seconds=0.5, verify_seconds=1.0)
    times = {"tokens": list(range(11)), "prefill_s": 1.0, "decode_s": 2.0}
    ours, theirs = times | {"speculation": counts}, times | {"rounds": 5, "drafted": 10}
    found = speculative.rates([ours, ours], [ours, ours])
    assert (found["tau"], found["nodes_per_round"], found["rounds"]) == (2.0, 2.0, 10)
    assert (found["draft_ms"], found["other_share"]) == (100.0, 0.25)
    found = speculative.rates([theirs, theirs], [theirs, theirs])
    assert (found["tau"], found["rounds"]) == (2.0, 10)


def test_answers_of_one_token_have_no_rounds():
    times = {"tokens": [1], "prefill_s": 1.0, "decode_s": 1e-6}
    found = speculative.rates([times | {"speculation": Speculation(1, 1)}], [times])
    assert (found["tau"], found["rounds"], found["draft_ms"]) == (1.0, 0, 0.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    bundle, prompts = Tiny.bundle_with_head(tmp_path / "b"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi", "category": "x"}\n{"prompt": "So", "category": "y"}\n')

    def run(*more):
        arguments = [bundle, "--prompts", prompts, "--categories", "x,y", "--threads", 1, *more]
        monkeypatch.setattr(sys, "argv", ["speculative", *map(str, arguments)])
        speculative.main()

    return run


@pytest.mark.parametrize(("modes", "tokens"), [("eagle", 6), ("eagle,plain", 1)])
def test_plain_is_always_measured_and_first(run, tmp_path, capsys, modes, tokens):
    run("--modes", modes, "--tokens", tokens, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [name for name, found in result.items() if isinstance(found, dict) and "tau" in found] == ["plain", "eagle"]
    assert result["eagle"]["identical_to_plain"] == 2
    assert set(result["eagle"]["by_category"]) == {"x", "y"}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["plain", "eagle"]


@pytest.mark.parametrize(
    ("mode", "message"), [("egle", "mode='egle' is not known; use auto, plain"), ("chain", "needs intermediate")]
)
def test_a_mode_that_cannot_be_is_refused_before_a_model_is_loaded(run, monkeypatch, capsys, mode, message):
    monkeypatch.setattr(speculative, "Ours", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        run("--modes", f"plain,{mode}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
