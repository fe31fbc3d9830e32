import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.formats.bundle import MANIFEST, Bundle, verify_bundle, write_manifest
from deploy.formats.errors import BundleError


@pytest.fixture
def bundle(tmp_path, tiny):
    return tiny.bundle(tmp_path / "b")


def edit_manifest(bundle, **changes):
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | changes))


def test_a_sound_bundle_opens_and_verifies(bundle):
    assert verify_bundle(bundle) == []
    opened = Bundle.open(bundle)
    target = opened.component("target")
    assert target.architecture == "llama"
    assert target.precision == "4-bit, groups of 32, zero points; BF16 embedding"
    assert target.context_length == 128
    assert opened.manifest.quality == ({"method": "rtn", "prose": 12.5},)
    with opened.model() as model:
        assert model.shape.vocab_size == 263
    assert opened.chat_template().identity == opened.manifest.chat_template


def test_a_link_to_a_bundle_is_a_bundle(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert verify_bundle(tmp_path / "link") == []
    Bundle.open(tmp_path / "link")


def test_the_manifest_lists_every_other_file(bundle):
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(Bundle.open(bundle).manifest.files) == files - {MANIFEST}


@pytest.mark.parametrize("name", ["target/model.safetensors", "tokenizer.json", "README.md", "target/config.json"])
def test_one_flipped_bit_anywhere_is_found(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (bundle / name).write_bytes(data)
    assert any(name in problem and "sha256" in problem for problem in verify_bundle(bundle))
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(bundle)


def test_every_problem_is_named_not_only_the_first(bundle):
    (bundle / "README.md").unlink()
    (bundle / "extra.bin").write_bytes(b"x")
    (bundle / "report.html").write_text("other")
    problems = verify_bundle(bundle)
    assert len(problems) == 3
    for name in ("README.md: missing", "extra.bin: not listed", "report.html: has 5 bytes"):
        assert any(name in problem for problem in problems)


@pytest.mark.parametrize("name", ["target/model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_found(bundle, name):
    (bundle / name).unlink()
    assert any(name in problem and "missing" in problem for problem in verify_bundle(bundle))
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(bundle)


def test_a_newer_format_is_refused(bundle):
    edit_manifest(bundle, format_version=2)
    assert "newer" in verify_bundle(bundle)[0]
    with pytest.raises(BundleError, match="format_version=2 is newer"):
        Bundle.open(bundle)


def rehash(bundle):
    """A consistent manifest over whatever is there, as a careless tool would write it."""
    import hashlib

    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_wrong_shape_is_found_even_with_matching_digests(bundle):
    config = json.loads((bundle / "target" / "config.json").read_text())
    (bundle / "target" / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    rehash(bundle)
    problems = verify_bundle(bundle)
    assert any("gate_proj" in problem and "expected" in problem for problem in problems)


def test_a_description_that_does_not_match_is_found(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["components"]["target"]["precision"] = "8-bit"
    edit_manifest(bundle, components=manifest["components"])
    assert any("8-bit" in problem for problem in verify_bundle(bundle))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": "1"}, "format_version='1'"),
        ({"components": {}}, "no target"),
        ({"components": {"target": {"path": "target"}}}, "architecture"),
        ({"components": {"oracle": {}, "target": {}}}, "'oracle' is not known"),
        ({"extensions": ["telepathy"]}, "telepathy"),
        ({"licence": None}, "licence"),
        ({"quality": [3]}, "quality"),
        ({"files": {}}, "does not list tokenizer.json"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0" * 64}}}, "inside the bundle"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "inside the bundle"),
        ({"files": {"a": {"bytes": 1, "sha256": "zz"}}}, "sha256"),
    ],
)
def test_a_manifest_that_is_not_as_documented_is_refused(bundle, changes, reason):
    edit_manifest(bundle, **changes)
    with pytest.raises(BundleError, match=reason):
        Bundle.open(bundle)
    assert len(verify_bundle(bundle)) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_manifest_that_is_not_json_is_refused(bundle, content):
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle)


def test_a_directory_without_manifest_is_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path)
    assert "no such directory" in verify_bundle(tmp_path / "nowhere")[0]


def test_a_link_inside_is_refused(bundle, tmp_path):
    (bundle / "README.md").rename(tmp_path / "elsewhere.md")
    (bundle / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert any("is a link" in problem for problem in verify_bundle(bundle))


def test_float_minima_must_be_declared(tmp_path, tiny):
    with pytest.raises(BundleError, match="weight_min"):
        tiny.bundle(tmp_path / "b", tiny.Quantized(form="minimum"), extensions=[])
    with pytest.raises(BundleError, match="input_flatten"):
        tiny.bundle(tmp_path / "f", tiny.MIXED, extensions=["weight_min"])
    assert not (tmp_path / "b" / MANIFEST).exists()
    bundle = tiny.bundle(tmp_path / "c", tiny.Quantized(form="minimum"))
    assert Bundle.open(bundle).manifest.extensions == ("weight_min",)


def test_a_standard_twin_may_stand_beside_the_target(tmp_path, tiny):
    tiny.model(tmp_path / "b" / "target-w4a16", tiny.config(), tiny.Quantized(form="symmetric"))
    components = {"target": "target", "target-w4a16": "target-w4a16"}
    bundle = tiny.bundle(tmp_path / "b", tiny.Quantized(form="minimum"), components=components)
    assert verify_bundle(bundle) == []
    assert Bundle.open(bundle).model("target-w4a16").quantization.groups[0].symmetric


def test_a_head_stands_beside_its_target_with_what_it_is_worth(tmp_path, tiny):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    assert verify_bundle(bundle) == []
    head = Bundle.open(bundle).component("eagle-target")
    assert (head.architecture, head.precision) == ("eagle3", "BF16, the target's embedding")
    assert head.context_length == 128
    assert head.drafter.acceptance.by_position == (0.5, 0.25, 0.125)
    assert (head.drafter.acceptance.tau, head.drafter.mbsu) == (1.875, 1.4)
    assert (head.drafter.draft_vocab_size, head.drafter.feature_layers) == (37, (0, 1, 2))
    assert head.drafter.target == "c" * 64
    assert Bundle.open(bundle).component("target").drafter is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_files": {"config.json": "0" * 64}}, "eagle-target: the head was trained on another target"),
        ({"tokenizer": "0" * 64}, "eagle-target: the head was trained with another tokenizer"),
        ({"chat_template": "0" * 64}, "eagle-target: the head was trained with another chat template"),
    ],
)
def test_a_head_of_something_else_makes_no_bundle(tmp_path, tiny, changes, message):
    with pytest.raises(BundleError, match=message):
        tiny.bundle_with_head(tmp_path / "b", **changes)


def test_another_target_under_a_head_is_found_even_with_matching_digests(tmp_path, tiny):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    tiny.model(bundle / "target", tiny.config(), tiny.Quantized(), seed=1)
    rehash(bundle)
    (problem,) = verify_bundle(bundle)
    assert "eagle-target: the head was trained on another target: model.safetensors was" in problem


def test_a_head_that_is_damaged_is_found_even_with_matching_digests(tmp_path, tiny):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    config = json.loads((bundle / "eagle-target" / "config.json").read_text())
    (bundle / "eagle-target" / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 36}))
    rehash(bundle)
    (problem,) = verify_bundle(bundle)
    assert "expected BF16 [36, 96]" in problem


@pytest.mark.parametrize(
    ("drafter", "reason"),
    [
        (None, "'eagle-target' has no drafter"),
        ({"draft_vocab_size": "many"}, r"'eagle-target' has no drafter\.draft_vocab_size"),
        ({"acceptance": {"by_position": [2], "tau": 1}}, r"drafter\.acceptance\.by_position=\[2\] is not a list"),
        ({"mbsu": None}, r"drafter\.mbsu=None is not a number"),
    ],
)
def test_a_heads_description_that_is_not_as_documented_is_refused(tmp_path, tiny, drafter, reason):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    components = json.loads((bundle / MANIFEST).read_text())["components"]
    head = components["eagle-target"]
    head["drafter"] = drafter and head["drafter"] | drafter
    edit_manifest(bundle, components=components)
    with pytest.raises(BundleError, match=reason):
        Bundle.open(bundle)


def test_an_incomplete_directory_gets_no_manifest(bundle):
    (bundle / MANIFEST).unlink()
    (bundle / "report.html").unlink()
    with pytest.raises(BundleError, match=r"report\.html: missing"):
        write_manifest(bundle, name="b", components={"target": "target"}, provenance={}, licence="mit")
    assert not (bundle / MANIFEST).exists()


def test_special_tokens_may_be_written_as_objects(bundle):
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    (bundle / "tokenizer_config.json").write_text(json.dumps(tokens))
    (bundle / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}")
    rehash(bundle)
    assert Bundle.open(bundle).chat_template().render([], add_generation_prompt=True) == "<s>|"


DAMAGE = st.sampled_from([None, -1, 0, 1, 2**70, 1.5, float("nan"), "x", [], {}, True, [1], {"a": 1}])


def damage(data: st.DataObject, value: Any) -> None:
    """Replace or remove one value somewhere in a JSON object."""
    while True:
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if isinstance(value[key], dict | list) and value[key] and data.draw(st.booleans()):
            value = value[key]
            continue
        if data.draw(st.booleans()):
            value[key] = data.draw(DAMAGE)
        else:
            del value[key]
        return


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, tiny):
    return tiny.bundle_with_head(tmp_path_factory.mktemp("damaged") / "b")


HEAD_FILES = ("eagle-target/config.json", "eagle-target/training.json")


@pytest.mark.parametrize("name", [MANIFEST, "target/config.json", *HEAD_FILES])
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_the_json_files_the_answer_is_a_list_of_problems(damaged, name, data):
    original = (damaged / name).read_text()
    content = json.loads(original)
    damage(data, content)
    try:
        (damaged / name).write_text(json.dumps(content))
        assert all(isinstance(problem, str) for problem in verify_bundle(damaged))
    finally:
        (damaged / name).write_text(original)
