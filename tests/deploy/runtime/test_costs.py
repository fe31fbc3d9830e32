import json

import pytest

from deploy.runtime.costs import Costs, DraftCost, cache_path, measure_drafts, measure_rows, read_costs, write_costs
from deploy.runtime.cpu_backend import CpuBackend

COSTS = Costs({"target": {1: 2.0, 8: 4.0}}, {"eagle-target": DraftCost(0.3, {1: 0.2, 4: 0.4})})


def test_what_was_written_is_read_again(tmp_path):
    path = tmp_path / "a" / "costs.json"
    assert read_costs(path) is None
    write_costs(path, COSTS)
    assert read_costs(path) == COSTS
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("change", [{"version": 0}, {"rows_ms": 3}, {"drafts": {"x": {}}}])
def test_what_another_version_wrote_is_measured_again(tmp_path, change):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(COSTS.to_json() | change))
    assert read_costs(path) is None
    path.write_text("{")
    assert read_costs(path) is None


def test_another_bundle_or_device_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {cache_path(digest, {"threads": threads}) for digest in ("a", "b") for threads in (1, 2)}
    assert len(paths) == 4
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_forwards_are_timed_by_rows_and_leave_nothing_behind(tmp_path, tiny):
    model = CpuBackend(tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized()))
    found = measure_rows(model, (1, 3), context=20)
    assert set(found) == {1, 3}
    assert all(milliseconds > 0 for milliseconds in found.values())
    assert model.cache_bytes == 0


def test_a_forward_is_timed_as_it_is_among_its_like(tmp_path, tiny, monkeypatch):
    """One that follows another number of rows, or follows such a one closely, takes half as long again."""
    model = CpuBackend(tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized()))
    now, last = 0.0, []

    def forward_tokens(rows, _sampling):
        nonlocal now
        like = [count == len(rows) for count in last[-3:]]
        now += 1e-3 * len(rows) * (1.0 if len(like) == 3 and all(like) else 1.5)
        last.append(len(rows))

    monkeypatch.setattr(model, "forward_tokens", forward_tokens)
    monkeypatch.setattr("deploy.runtime.costs.time.perf_counter", lambda: now)
    assert measure_rows(model, (1, 3), context=20) == pytest.approx({1: 1.0, 3: 3.0})


def test_a_draft_is_timed_after_a_forward_of_the_target(tmp_path, tiny, monkeypatch):
    target, drafting = (CpuBackend(tiny.model(tmp_path / name, tiny.config(), tiny.Quantized())) for name in "td")
    calls = []
    for model, name in ((target, "forward_tokens"), (drafting, "draft")):
        method = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, name=name, method=method: calls.append(name) or method(*a))
    cost = measure_drafts(drafting, target, drafting.shape.hidden_size, context=20, repeats=2)
    assert calls == ["draft"] + ["forward_tokens", "draft"] * 3 * 3  # the context; three kinds, one more to warm up
    assert cost.first_ms > 0
    assert set(cost.level_ms) == {1, 4}
    assert target.cache_bytes == drafting.cache_bytes == 0
