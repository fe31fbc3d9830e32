"""Reuse, reasons, and what a failing stage leaves behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.formats.safetensors_file import write_safetensors
from pipeline.errors import StoreError
from pipeline.graph import BuildContext
from pipeline.run import closing_lines, package_versions
from pipeline.store import verify_artifact

ALL = ["target", "calibrate", "quantize", "export"]


def test_a_second_run_reuses_everything_and_says_why(bench: Any) -> None:
    bench.run(bench.chain())
    assert bench.built == ALL
    outcomes = bench.run(bench.chain())
    assert bench.built == []
    assert [outcome.was_built for outcome in outcomes] == [False] * 4
    assert "reused: config, inputs, code and packages unchanged; built 20" in bench.line("quantize", "reused")


def test_a_changed_key_rebuilds_what_depends_on_it_and_is_named(bench: Any) -> None:
    bench.run(bench.chain())
    assert "never built" in bench.line("calibrate", "building")
    bench.run(bench.chain(calibrate="other"))
    assert bench.built == ["calibrate", "quantize", "export"]
    assert "calibrate.text c → other" in bench.line("calibrate", "building")
    assert bench.line("quantize", "building").endswith("input calibrate changed")


def test_going_back_to_an_earlier_config_reuses_it(bench: Any) -> None:
    bench.run(bench.chain())
    bench.run(bench.chain(calibrate="other"))
    bench.run(bench.chain())
    assert bench.built == []


def test_the_manifest_records_how_it_was_built(bench: Any) -> None:
    outcome = bench.run([bench.stage("target", seed=7, packages=("numpy", "python"))])[0]
    manifest = outcome.artifact.manifest
    assert (manifest.stage, manifest.seed, set(manifest.packages)) == ("target", 7, {"numpy", "python"})
    assert manifest.peak_bytes > 1 << 20
    assert manifest.wall_seconds >= 0
    assert manifest.files["out.txt"].size == len("target()")
    assert bench.store.find("target", manifest.digest).manifest == manifest


def test_no_path_enters_the_digest(bench: Any, new_bench: Any, tmp_path: Path) -> None:
    other = new_bench(tmp_path / "elsewhere")
    here, there = bench.run(bench.chain()), other.run(other.chain())
    assert [outcome.artifact.manifest.digest for outcome in here] == [
        outcome.artifact.manifest.digest for outcome in there
    ]


def test_a_forced_rebuild_with_the_same_bytes_keeps_later_stages(bench: Any) -> None:
    bench.run(bench.chain())
    bench.run(bench.chain(), force=("target",))
    assert bench.built == ["target"]
    assert bench.line("target", "building").endswith("forced")


def test_a_forced_rebuild_with_other_bytes_rebuilds_later_stages(bench: Any) -> None:
    def build(context: BuildContext) -> None:
        (context.out / "out.txt").write_text(os.urandom(8).hex())

    def chain() -> list[Any]:
        target = bench.stage("target", build=build)
        return [target, bench.stage("quantize", target)]

    bench.run(chain())
    bench.run(chain(), force=("target",))
    assert bench.built == ["quantize"]
    assert "input target changed" in bench.line("quantize", "building")


def test_from_stage_rebuilds_from_there_on(bench: Any) -> None:
    bench.run(bench.chain())
    bench.run(bench.chain(), from_stage="quantize")
    assert bench.built == ["quantize", "export"]


def test_a_selected_stage_builds_its_missing_inputs_and_nothing_after(bench: Any) -> None:
    bench.run(bench.chain(), stage=("calibrate",))
    assert bench.built == ["target", "calibrate"]


def test_a_seed_a_version_and_a_fingerprint_each_cause_a_rebuild(bench: Any) -> None:
    bench.run([bench.stage("target")])
    for fields, reason in [
        ({"seed": 3}, "seed 0 → 3"),
        ({"version": 2}, "stage version 1 → 2"),
        ({"fingerprint": lambda: {"source": "abc"}}, "source changed"),
    ]:
        bench.run([bench.stage("target", **fields)])
        assert bench.line("target", "building").endswith(reason)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match="package no-such-thing is not installed"):
        package_versions(["no-such-thing"])


def test_all_checks_come_before_any_work(bench: Any) -> None:
    def refuse(config: dict[str, Any]) -> None:
        raise ValueError(f"export.text={config['text']} is wrong; use another")

    target = bench.stage("target")
    with pytest.raises(ValueError, match=r"export.text=x is wrong"):
        bench.run([target, bench.stage("export", target, text="x", check=refuse)])
    assert bench.built == []


def test_two_instances_with_one_digest_are_built_once_even_when_forced(bench: Any) -> None:
    stages = [bench.stage("quantize-a", text="same"), bench.stage("quantize-b", text="same")]
    bench.run(stages)
    assert bench.built == ["quantize-a"]
    bench.run(stages, force=("quantize",))
    assert bench.built == ["quantize-a"]


@pytest.mark.parametrize("is_resumable", [False, True])
def test_a_failed_build_keeps_its_partial_files_only_when_resumable(bench: Any, *, is_resumable: bool) -> None:
    seen = []

    def build(context: BuildContext) -> None:
        seen.append(sorted(path.name for path in context.out.iterdir()))
        (context.out / "half").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("stop")

    stage = bench.stage("train", build=build, resumable=is_resumable)
    with pytest.raises(RuntimeError):
        bench.run([stage])
    bench.run([stage])
    assert seen == [[], ["half"] if is_resumable else []]


@pytest.mark.parametrize("is_resumable", [False, True])
def test_scratch_outlives_an_interruption_even_of_the_publishing_and_ends_with_the_build(
    bench: Any, monkeypatch: pytest.MonkeyPatch, *, is_resumable: bool
) -> None:
    seen = []

    def build(context: BuildContext) -> None:
        seen.append(sorted(path.name for path in context.scratch.iterdir()))
        (context.scratch / f"checkpoint {len(seen)}").write_text("x")
        (context.out / "done").write_text("y")

    def interrupted(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    stage = bench.stage("train", build=build, resumable=is_resumable)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.run.list_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.run([stage])
    (outcome,) = bench.run([stage])
    assert seen == [[], ["checkpoint 1"] if is_resumable else []]
    assert any("goes on where an earlier build was interrupted" in line for line in bench.lines) == is_resumable
    assert list(outcome.artifact.manifest.files) == ["done"]
    assert [path.name for path in outcome.artifact.path.parent.iterdir()] == [outcome.artifact.path.name]
    bench.run([stage], force=("train",))
    assert seen[-1] == []


def test_what_a_killed_writer_left_is_no_part_of_the_artifact(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(context: BuildContext) -> None:
        (context.out / "model").mkdir(exist_ok=True)
        write_safetensors(context.out / "model" / "a.safetensors", {"x": np.zeros(3, np.float32)})

    stage = bench.stage("train", build=build, resumable=True)
    with monkeypatch.context() as patched:  # as SIGKILL would: nothing is cleared up
        patched.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(pytest.fail.Exception):
            bench.run([stage])
    (partial,) = (path for path in bench.store.root.glob("train/*.partial"))
    assert len(list((partial / "model").iterdir())) == 1
    (outcome,) = bench.run([stage])
    assert list(outcome.artifact.manifest.files) == ["model/a.safetensors"]


def test_a_forced_resumable_stage_starts_from_nothing(bench: Any) -> None:
    seen = []

    def build(context: BuildContext) -> None:
        seen.append(sorted(path.name for path in context.out.iterdir()))
        (context.out / "half").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("stop")

    stage = bench.stage("train", build=build, resumable=True)
    with pytest.raises(RuntimeError):
        bench.run([stage])
    bench.run([stage], force=("train",))
    assert seen == [[], []]


def test_a_forced_build_that_was_interrupted_goes_on_when_it_is_forced_again(bench: Any) -> None:
    seen: list[list[str]] = []

    def build(context: BuildContext) -> None:
        seen.append(sorted(path.name for path in context.out.iterdir()))
        (context.out / f"part {len(seen)}").write_text("x")
        if len(seen) in (2, 3):
            raise RuntimeError("stop")

    stage = bench.stage("train", build=build, resumable=True)
    bench.run([stage])
    for _ in range(2):
        with pytest.raises(RuntimeError):
            bench.run([stage], force=("train",))
    bench.run([stage], force=("train",))
    assert seen == [[], [], ["part 2"], ["part 2", "part 3"]]
    bench.run([stage], force=("train",))  # that one had ended
    assert seen[-1] == []


def counting(bench: Any, limit: int, **fields: Any) -> Any:
    """A stage that writes as many files as its config says, and continues a smaller one of the same seed."""

    def build(context: BuildContext) -> None:
        bench.built.append(sorted(path.name for path in context.out.iterdir()))
        for number in range(context.config["limit"]):
            (context.out / str(number)).write_text(str(number))

    return bench.stage(
        "count",
        build=build,
        config={"limit": limit},
        resumable=True,
        continues=lambda smaller, config: smaller["limit"] < config["limit"],
        **fields,
    )


def test_a_build_goes_on_from_the_largest_artifact_that_is_its_beginning(bench: Any) -> None:
    for limit, begins in ((1, 0), (2, 1), (4, 2), (3, 2)):
        (outcome,) = bench.run([counting(bench, limit)])
        assert bench.built == [[str(number) for number in range(begins)]]
        assert sorted(outcome.artifact.manifest.files) == [str(number) for number in range(limit)]
    assert bench.line("count", "continues").endswith(bench.run([counting(bench, 2)])[0].artifact.manifest.digest)


@pytest.mark.parametrize("difference", ["seed", "version", "force", "damage", "flipped"])
def test_what_is_not_its_beginning_is_not_continued(bench: Any, difference: str) -> None:
    (smaller,) = bench.run([counting(bench, 2)])
    if difference == "damage":
        (smaller.artifact.path / "1").unlink()
    if difference == "flipped":
        (smaller.artifact.path / "1").write_text("2")
    fields = {difference: 5} if difference in ("seed", "version") else {}
    bench.run([counting(bench, 3, **fields)], force=("count",) if difference == "force" else ())
    assert bench.built == [[]]


def test_what_a_killed_copy_left_is_no_artifact_and_goes(bench: Any) -> None:
    bench.run([counting(bench, 2)])
    key = bench.run([counting(bench, 3)])[0].artifact
    shutil.rmtree(key.path)
    left = key.path.with_name(key.path.name + ".partial.copying")
    left.mkdir()
    (left / "0").write_text("half")
    (outcome,) = bench.run([counting(bench, 3)])
    assert bench.built == [["0", "1"]]
    assert outcome.artifact.manifest.content == key.manifest.content
    assert not left.exists()


def damage_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{")
    return "manifest.json cannot be read"


def lose_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def lose_file(path: Path) -> str:
    (path / "out.txt").unlink()
    return "out.txt is missing"


def truncate_file(path: Path) -> str:
    (path / "out.txt").write_text("x")
    return "out.txt has 1 bytes, not 9"


@pytest.mark.parametrize("damage", [damage_manifest, lose_manifest, lose_file, truncate_file])
def test_a_damaged_artifact_is_reported_and_rebuilt(bench: Any, damage: Any) -> None:
    outcome = bench.run([bench.stage("target", text="t")])[0]
    problem = damage(outcome.artifact.path)
    bench.run([bench.stage("target", text="t")])
    assert f"damaged: {problem}" in bench.line("target", "building")
    assert (outcome.artifact.path / "out.txt").read_text() == "target(t)"


def test_a_flipped_byte_is_found_on_request(bench: Any) -> None:
    artifact = bench.run([bench.stage("target", text="t")])[0].artifact
    assert verify_artifact(artifact) == []
    (artifact.path / "out.txt").write_text("target(u)")
    assert verify_artifact(artifact) == [f"{artifact.path / 'out.txt'} differs from its sha256 in manifest.json"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_made(bench: Any) -> None:
    def build(context: BuildContext) -> None:
        (context.out / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"artifacts: no space left on its disk; free some or set store="):
        bench.run([bench.stage("target", build=build)])
    assert list((bench.store.root / "target").iterdir()) == []


def test_stages_report_to_the_tracker_whether_built_or_reused(bench: Any) -> None:
    def build(context: BuildContext) -> None:
        with context.progress(2, "x", "steps") as bar:
            bar.update(2)
        context.tracker.log(context.stage, {"loss": 1.5}, 1)
        context.summary["perplexity"] = 18.0

    bench.run([bench.stage("quantize-a", build=build)])
    bench.run([bench.stage("quantize-a", build=build)])
    kinds = [call[0] for call in bench.tracker.calls]
    assert kinds == ["log", "summary", "artifact", "summary", "artifact"]
    assert bench.tracker.calls[1] == bench.tracker.calls[3] == ("summary", "quantize-a", {"perplexity": 18.0})


def test_a_run_closes_with_the_last_stages_lines_and_what_is_published(bench: Any) -> None:
    def build(context: BuildContext) -> None:
        context.summary["lines"] = ["a table"]

    stage = bench.stage("export", build=build, publish=lambda path, manifest: [f"linked {path.name[:4]}"])
    outcomes = bench.run([bench.stage("target"), stage])
    assert closing_lines(outcomes) == ["a table", f"linked {outcomes[-1].artifact.path.name[:4]}"]
    assert closing_lines([]) == []
