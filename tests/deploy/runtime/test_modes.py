"""Drafters by name: what they are made with, and what is refused before any model is loaded."""

import re
from dataclasses import fields

import pytest

from deploy.formats.bundle import Bundle
from deploy.runtime import session as session_module
from deploy.runtime.drafters.cascade import Cascade
from deploy.runtime.drafters.lookup import LookupDrafter
from deploy.runtime.modes import MODES, DrafterFactory, DraftOptions
from deploy.runtime.session import Session

SIZES = tuple(field.name for field in fields(DraftOptions))
TREE = {"depth", "width", "num_nodes"}
TAKEN = {
    "auto": set(),
    "plain": set(),
    "lookup": {"depth"},
    "cascade": {*TREE, "min_draft_length"},
    "cascade-lookup": {"depth", "min_draft_length"},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("bundles") / "b"
    tiny.hierarchy(path, None)
    return Bundle.open(tiny.finish_hierarchy(path))


@pytest.fixture(scope="module")
def factory(bundle):
    return DrafterFactory(bundle, Session.open(bundle, threads=1).backend, "cpu", 1)


def size_of(drafter, size):
    """What the drafter was made with."""
    if size == "min_draft_length":
        return drafter.min_draft_length
    inner = drafter.inner if isinstance(drafter, Cascade) else drafter
    if isinstance(inner, LookupDrafter):
        (depth,) = set(inner._num_tokens.values())
        return depth
    return getattr(inner.limits, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_a_size_shapes_the_drafts_or_is_refused(factory, mode, size):
    taken = TAKEN.get(mode, TREE)
    if size in taken:
        assert size_of(factory.make(mode, DraftOptions(**{size: 2})), size) == 2
        return
    with pytest.raises(ValueError, match=f"mode='{mode}' does not take {size}=2: it takes ") as refused:
        factory.make(mode, DraftOptions(**{size: 2}))
    named = re.search("it takes (.*);", str(refused.value)).group(1)
    assert set(named.split(", ")) == (taken or {"no sizes of drafts"})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, -7])
def test_a_size_below_one_is_out_of_range(size, value):
    with pytest.raises(ValueError, match=f"{size}={value} is out of range; use 1 or more"):
        DraftOptions(**{size: value})


@pytest.mark.parametrize("mode", ["lookup", "cascade-lookup", "chain", "cascade"])
def test_a_depth_beyond_the_largest_draft_is_out_of_range(factory, mode):
    with pytest.raises(ValueError, match="depth=65 is out of range"):
        factory.make(mode, DraftOptions(depth=65))


def test_an_unknown_mode_is_a_value_error_that_names_the_known_ones(factory):
    with pytest.raises(ValueError, match="mode='dance' is not known; use auto, plain, lookup"):
        factory.make("dance")


@pytest.mark.parametrize(
    ("mode", "sizes", "message"),
    [
        ("dance", {}, "mode='dance' is not known"),
        ("plain", {"depth": 3}, "mode='plain' does not take depth=3"),
        ("eagle", {}, "mode='eagle' needs eagle-target"),
    ],
)
def test_a_session_refuses_a_mode_before_it_loads_a_model(monkeypatch, tmp_path, tiny, mode, sizes, message):
    monkeypatch.setattr(session_module, "open_backend", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        Session.open(Bundle.open(tiny.bundle(tmp_path / "b")), mode=mode, drafts=DraftOptions(**sizes))
