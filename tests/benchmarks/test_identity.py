"""Every mode against plain decoding: how rounds are counted, and what is refused before the work."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import identity
from deploy.runtime.generation import Generation, GenerationOptions, Request
from deploy.runtime.speculation import Speculation
from tests.deploy.conftest import Tiny


def test_tokens_a_forward_leave_the_one_out_that_reads_the_prompt(monkeypatch):
    """11 tokens in 6 forwards, the first of which gave one: 10 in 5."""
    made = Generation("some text", tuple(range(11)), "length", 4, 0, 1.0, 1.0, Speculation(6, 11))
    monkeypatch.setattr(identity, "answer", lambda _session, requests, _in_flight: [made] * len(requests))
    session, factory = SimpleNamespace(use=lambda _: None), SimpleNamespace(make=lambda _: None)
    requests = [Request([1], GenerationOptions(11))] * 4
    found = dict(identity.compare(session, factory, ["eagle"], requests))["eagle"]
    assert (found["tau"], found["tokens"], found["same"], found["total"]) == (2.0, 44, 4, 4)


def test_an_interrupted_run_goes_on_with_what_is_missing(monkeypatch, tmp_path, capsys):
    bundle, prompts, out = Tiny.bundle(tmp_path / "b"), tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments = [str(bundle), "--prompts", str(prompts), "--tokens", "8", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["identity", *arguments])
    monkeypatch.setattr(identity.Session, "encode_chat", lambda _self, _messages: [1, 2, 3])
    compare = identity.compare

    def until_interrupted(*arguments):
        yield next(compare(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(identity, "compare", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        identity.main()
    first = json.loads(out.read_text())["samplings"]
    assert [list(by_mode) for by_mode in first.values()] == [["auto"]]
    monkeypatch.setattr(identity, "compare", compare)
    identity.main()
    found = json.loads(out.read_text())["samplings"]
    assert set(found) == set(identity.SAMPLINGS)
    assert found["greedy"]["auto"] == first["greedy"]["auto"]
    assert found["greedy"]["auto"]["threads"] >= 1
    assert all(set(by_mode) == {"auto", "lookup"} for by_mode in found.values())
    capsys.readouterr()
    identity.main()
    assert capsys.readouterr().out.count("all done before") == 3


def test_a_misspelt_mode_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
    bundle = Tiny.bundle(tmp_path / "b")
    arguments = [str(bundle), "--prompts", str(tmp_path / "none.jsonl"), "--modes", "plain,lokup"]
    monkeypatch.setattr(sys, "argv", ["identity", *arguments])
    monkeypatch.setattr(identity.Session, "open", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        identity.main()
    assert ended.value.code == 2
    assert "--modes: mode='lokup' is not known; use auto, plain, lookup" in capsys.readouterr().err


def test_figures_that_another_run_added_stay_and_a_difference_is_not_forgotten(monkeypatch, tmp_path):
    """Another run adds a mode while this one works; later, one over other prompts replaces the file."""
    bundle, prompts, out = Tiny.bundle(tmp_path / "b"), tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "a"}\n')
    arguments = [str(bundle), "--prompts", str(prompts), "--tokens", "8", "--json", str(out), "--samplings", "greedy"]
    monkeypatch.setattr(sys, "argv", ["identity", *arguments])
    monkeypatch.setattr(identity.Session, "encode_chat", lambda _self, _messages: [1, 2, 3])
    result = {"bundle": "b", "prompts": 1, "tokens": 8, "machine": {}}

    def one_differs(*_arguments):
        identity.record(out, result, "greedy", "eagle", {"same": 1, "total": 1})
        yield "auto", {"same": 0, "total": 1}
        assert set(json.loads(out.read_text())["samplings"]["greedy"]) == {"eagle", "auto"}
        identity.record(out, {**result, "prompts": 2}, "greedy", "eagle", {"same": 2, "total": 2})
        yield "lookup", {"same": 1, "total": 1}

    monkeypatch.setattr(identity, "compare", one_differs)
    with pytest.raises(SystemExit, match=r"differ from plain decoding's, a bug: greedy, auto$"):
        identity.main()
    assert set(json.loads(out.read_text())["samplings"]["greedy"]) == {"lookup"}
