"""Every mode against plain decoding: how rounds are counted, and what is refused before the work."""

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
    found = identity.compare(session, factory, ["eagle"], requests)["eagle"]
    assert (found["tau"], found["tokens"], found["same"], found["total"]) == (2.0, 44, 4, 4)


def test_a_misspelt_mode_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
    bundle = Tiny.bundle(tmp_path / "b")
    arguments = [str(bundle), "--prompts", str(tmp_path / "none.jsonl"), "--modes", "plain,lokup"]
    monkeypatch.setattr(sys, "argv", ["identity", *arguments])
    monkeypatch.setattr(identity.Session, "open", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        identity.main()
    assert ended.value.code == 2
    assert "--modes: mode='lokup' is not known; use auto, plain, lookup" in capsys.readouterr().err
