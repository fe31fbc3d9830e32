"""Why a stage runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.manifest import InputRef, Key, Manifest
from pipeline.reasons import differences, why_missing

OLD = Key(
    stage="quantize",
    version=1,
    config={"bits": 8, "gptq": {"damping": 0.01}},
    seed=0,
    inputs={"target": "aaa", "calibrate": "bbb"},
    fingerprints={"source": "ccc"},
    packages={"llmcompressor": "0.13"},
)


def changed(**fields: Any) -> Key:
    return dataclasses.replace(OLD, **fields)


def manifest_of(key: Key, built: str) -> Manifest:
    return Manifest(
        stage=key.stage,
        instance=key.stage,
        digest=key.digest,
        version=key.version,
        config=key.config,
        seed=key.seed,
        inputs={role: InputRef(role, "0", content) for role, content in key.inputs.items()},
        fingerprints=key.fingerprints,
        packages=key.packages,
        built=built,
        wall_seconds=1.0,
        peak_bytes=1,
        files={},
        content="",
        summary={},
    )


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (changed(config={"bits": 4, "gptq": {"damping": 0.01}}), "quantize.bits 8 → 4"),
        (changed(config={"bits": 8, "gptq": {"damping": 0.1}}), "quantize.gptq.damping 0.01 → 0.1"),
        (changed(config={"bits": 8}), "quantize.gptq.damping 0.01 → absent"),
        (changed(inputs={"target": "aaa", "calibrate": "xxx"}), "input calibrate changed"),
        (changed(inputs={"target": "aaa"}), "input calibrate removed"),
        (changed(version=2), "stage version 1 → 2"),
        (changed(packages={"llmcompressor": "0.14"}), "package llmcompressor 0.13 → 0.14"),
        (changed(seed=7), "seed 0 → 7"),
        (changed(fingerprints={"source": "ddd"}), "source changed"),
    ],
)
def test_a_change_is_named(new: Key, expected: str) -> None:
    assert new.digest != OLD.digest
    assert differences(OLD, new) == [expected]


def test_an_input_names_the_stage_that_fills_it_where_the_role_does_not() -> None:
    new = changed(inputs={"target": "xxx", "calibrate": "bbb"})
    assert differences(OLD, new, {"target": "target[fp]"}) == ["input target (target[fp]) changed"]


def test_without_a_past_a_stage_was_never_built() -> None:
    assert why_missing(OLD, []) == "never built"


def test_the_nearest_past_counts_and_among_equals_the_newest() -> None:
    far = changed(config={"bits": 2}, version=9, seed=3)
    older = changed(config={"bits": 3, "gptq": {"damping": 0.01}})
    newer = changed(config={"bits": 6, "gptq": {"damping": 0.01}})
    past = [manifest_of(far, "2026-03"), manifest_of(newer, "2026-02"), manifest_of(older, "2026-01")]
    assert why_missing(OLD, past) == "quantize.bits 6 → 8"


def test_many_differences_are_cut_short() -> None:
    new = changed(config={f"k{index}": index for index in range(7)})
    assert why_missing(new, [manifest_of(OLD, "2026")]).endswith("and 5 more")


def test_a_tuple_equals_the_list_that_json_makes_of_it() -> None:
    assert differences(changed(config={"a": [1, 2]}), changed(config={"a": (1, 2)})) == []
    assert changed(config={"a": [1, 2]}).digest == changed(config={"a": (1, 2)}).digest
