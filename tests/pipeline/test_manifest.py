"""Keys, digests and manifests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.formats.digest import sha256_file
from pipeline.manifest import Key, Manifest, canonical_json, content_digest, list_files

KEY = Key("s", 1, {"a": 1}, 0, {}, {}, {})


def test_a_digest_ignores_the_order_of_keys() -> None:
    forward = Key("s", 1, {"a": 1, "b": 2}, 0, {"x": "1", "y": "2"}, {}, {})
    backward = Key("s", 1, {"b": 2, "a": 1}, 0, {"y": "2", "x": "1"}, {}, {})
    assert forward.digest == backward.digest


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), min_size=1))
def test_configs_differ_in_digest_exactly_when_they_differ_as_json(config: dict[str, object]) -> None:
    other = dict(reversed(config.items()))
    assert Key("s", 1, config, 0, {}, {}, {}).digest == Key("s", 1, other, 0, {}, {}, {}).digest
    name = next(iter(config))
    other[name] = [other[name]]
    assert Key("s", 1, config, 0, {}, {}, {}).digest != Key("s", 1, other, 0, {}, {}, {}).digest


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, b"x"])
def test_a_config_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json({"a": value})


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_files_are_hashed_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_text("{}")
    files = list_files(tmp_path)
    assert list(files) == ["sub/a.bin"]
    assert files["sub/a.bin"].size == 3
    assert files["sub/a.bin"].sha256 == hashlib.sha256(b"abc").hexdigest()


def test_a_large_file_hashes_like_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9001
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_link_in_an_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        list_files(tmp_path)


def test_content_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("x")
    same = [content_digest(list_files(tmp_path / name)) for name in ("one", "two")]
    assert same[0] == same[1]
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "b")
    assert content_digest(list_files(tmp_path / "two")) != same[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 1, "inputs": 3}'])
def test_a_broken_manifest_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(text)
