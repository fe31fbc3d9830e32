"""The comparison with llama.cpp, without llama.cpp."""

import json
import sys

import pytest

from benchmarks import peers
from tests.deploy.conftest import Tiny


@pytest.fixture
def export(tmp_path):
    """The directory in a store in which the bundle is."""
    return tmp_path / "artifacts" / "export" / "digest"


def arguments(bundle, *more):
    return ["peers", str(bundle), "--gguf", "none.gguf", "--peer-python", "none", *more]


@pytest.mark.parametrize("provenance", [{}, {"stages": {"calibrate": {"content": "abc"}}}])
def test_missing_heldout_samples_are_told_before_anything_is_timed(monkeypatch, export, provenance):
    bundle = Tiny.bundle(export / "bundle", provenance=provenance)
    monkeypatch.setattr(sys, "argv", arguments(bundle))
    monkeypatch.setattr(peers, "Peer", lambda _: pytest.fail("llama.cpp was started"))
    with pytest.raises(SystemExit, match=r"does not hold the samples .* or leave perplexity out with --decode-only"):
        peers.main()


def test_decoding_alone_needs_no_samples(monkeypatch, export):
    class Started(Exception):  # noqa: N818
        pass

    def start(_python):
        raise Started

    monkeypatch.setattr(sys, "argv", arguments(Tiny.bundle(export / "bundle"), "--decode-only"))
    monkeypatch.setattr(peers, "Peer", start)
    with pytest.raises(Started):
        peers.main()


def test_heldout_samples_are_those_of_the_bundles_own_run(export):
    bundle = Tiny.bundle(export / "bundle", provenance={"stages": {"calibrate": {"content": "abc"}}})
    for content, token in (("abc", 7), ("other", 8)):
        made = export.parents[1] / "calibrate" / content
        made.mkdir(parents=True)
        (made / "manifest.json").write_text(json.dumps({"content": content}))
        records = [{"split": split, "group": "chat", "ids": [token]} for split in ("calibration", "heldout", "heldout")]
        (made / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert peers.heldout_tokens(bundle, 1) == {"chat": [[7]]}
