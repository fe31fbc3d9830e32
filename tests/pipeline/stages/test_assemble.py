"""Where the files of a bundle's models come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stages.assemble import assemble, link_or_copy


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    files = {
        "target/model": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"),
        "quantize/model": ("config.json", "model.safetensors"),
        "eagle-target/head": ("config.json", "training.json"),
    }
    for directory, names in files.items():
        (tmp_path / directory).mkdir(parents=True)
        for name in names:
            (tmp_path / directory / name).write_text(f"{directory}/{name}")
    return {role: tmp_path / role for role in ("target", "quantize", "eagle-target")}


def test_every_model_has_its_place_and_the_tokenizer_is_the_targets(inputs: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert assemble(inputs, bundle) == {"target": "target", "eagle-target": "eagle-target"}
    found = {path.relative_to(bundle).as_posix(): path.read_text() for path in bundle.rglob("*") if path.is_file()}
    assert found["target/model.safetensors"] == "quantize/model/model.safetensors"
    assert found["eagle-target/training.json"] == "eagle-target/head/training.json"
    assert found["tokenizer.json"] == "target/model/tokenizer.json"
    assert len(found) == 7


def test_a_twin_and_no_head(inputs: dict[str, Path], tmp_path: Path) -> None:
    (inputs["quantize"] / "twin").mkdir()
    (inputs["quantize"] / "twin" / "config.json").write_text("twin")
    del inputs["eagle-target"]
    expected = {"target": "target", "target-w4a16": "target-w4a16"}
    assert assemble(inputs, tmp_path / "bundle", link_or_copy) == expected
    assert (tmp_path / "bundle" / "target-w4a16" / "config.json").read_text() == "twin"


def test_a_link_becomes_a_copy_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert ((tmp_path / "b").stat().st_nlink, (tmp_path / "c").stat().st_nlink) == (2, 1)
    assert (tmp_path / "c").read_text() == "x"
