"""Publishing: a link that always points to a whole bundle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.stages.export import _provenance, publish

MANIFEST: Any = SimpleNamespace(summary={"table": ["method  bits", "source  5.74"]})


def artifact(tmp_path: Path, name: str) -> Path:
    bundle = tmp_path / "artifacts" / "export" / name / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text(name)
    return bundle.parent


def test_the_link_is_relative_and_moves_with_its_parent(tmp_path: Path) -> None:
    publish(tmp_path / "bundles", "mine", artifact(tmp_path, "one"), MANIFEST)
    link = tmp_path / "bundles" / "mine"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert (link / "manifest.json").read_text() == "one"


def test_publishing_again_points_to_the_new_one_and_leaves_no_rest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        publish(tmp_path / "bundles", "mine", artifact(tmp_path, name), MANIFEST)
    assert (tmp_path / "bundles" / "mine" / "manifest.json").read_text() == "two"
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["mine"]


def test_a_link_whose_artifact_is_gone_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mine").symlink_to("nowhere")
    publish(tmp_path / "bundles", "mine", artifact(tmp_path, "one"), MANIFEST)
    assert (tmp_path / "bundles" / "mine" / "manifest.json").read_text() == "one"


def test_what_is_not_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bundles" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a link of ours"):
        publish(tmp_path / "bundles", "mine", artifact(tmp_path, "one"), MANIFEST)
    assert not (tmp_path / "bundles" / "mine").is_symlink()


def test_the_user_sees_the_table_the_bundle_and_what_to_type_next(tmp_path: Path) -> None:
    lines = publish(tmp_path / "bundles", "mine", artifact(tmp_path, "one"), MANIFEST)
    assert lines[1:3] == MANIFEST.summary["table"]
    assert f"bundle: {tmp_path / 'bundles' / 'mine'}" in lines
    assert any("python -m deploy generate" in line for line in lines)


def test_provenance_reads_the_same_whether_a_stage_was_built_now_or_before() -> None:
    config: dict[str, Any] = {"method": "rtn", "bits": 4, "chat": {"b": 1, "a": 2}}
    backwards: dict[str, Any] = {"chat": {"a": 2, "b": 1}, "bits": 4, "method": "rtn"}
    found = []
    for each in (config, backwards):
        packages = dict.fromkeys(each, "1")
        manifest = SimpleNamespace(
            config=each, seed=0, version=1, packages=packages, content="c", fingerprints=dict(packages)
        )
        context: Any = SimpleNamespace(manifests={"target": manifest, "quantize": manifest})
        found.append(json.dumps(_provenance(context, {"origin": "x"})))
    assert found[0] == found[1]
