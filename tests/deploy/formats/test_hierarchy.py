"""A bundle with an intermediate model and a head for it: what belongs together, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.formats.bundle import MANIFEST, Bundle, verify_bundle
from deploy.formats.digest import sha256_file
from deploy.formats.draft_vocabulary import VOCABULARY_FILE, write_draft_vocabulary
from deploy.formats.errors import BundleError
from deploy.runtime.modes import DrafterFactory, available_modes
from deploy.runtime.session import Session

IDS = np.array([2, 3, 9, 30, 31, 77, 200], dtype=np.int64)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, tiny: Any) -> Make:
    """Makes a bundle; changes: of config.json of the intermediate. owners: role → fields of its Owner, another's."""

    def bundle(ids: Any = IDS, owners: dict[str, Any] | None = None, **changes: Any) -> Path:
        made: Path = tiny.hierarchy(tmp_path / "b", ids, owners, **changes)
        return made

    return bundle


@pytest.fixture
def finish(tiny: Any) -> Make:
    finisher: Make = tiny.finish_hierarchy
    return finisher


def test_every_drafter_is_described_and_every_mode_is_there(make: Make, finish: Make) -> None:
    bundle = finish(make())
    assert verify_bundle(bundle) == []
    opened = Bundle.open(bundle)
    intermediate = opened.component("intermediate")
    assert intermediate.architecture == "llama"
    assert intermediate.drafter is not None
    assert (intermediate.drafter.draft_vocab_size, intermediate.drafter.feature_layers) == (len(IDS), ())
    assert "the intermediate's embedding" in opened.component("eagle-intermediate").precision
    assert {"chain", "cascade", "cascade-lookup"} <= set(available_modes(opened))


def test_the_runtime_loads_the_rows_that_may_be_drafted(make: Make, finish: Make) -> None:
    bundle = Bundle.open(finish(make()))
    session = Session.open(bundle, threads=1)
    model = DrafterFactory(bundle, session.backend, "cpu", 1).language_model("intermediate")
    from deploy.runtime.backend import Row

    assert model.forward([Row(5, 0)]).logits.shape == (1, len(IDS))


def test_without_a_draft_vocabulary_every_token_may_be_drafted(make: Make, finish: Make) -> None:
    bundle = Bundle.open(finish(make(ids=None)))
    drafter = bundle.component("intermediate").drafter
    assert drafter is not None and drafter.draft_vocab_size == 263
    assert bundle.draft_ids("intermediate") is None


@pytest.mark.parametrize(
    ("role", "fields", "message"),
    [
        (
            "intermediate",
            {"model_files": {}},
            "intermediate was trained on another target: config",
        ),
        (
            "intermediate",
            {"tokenizer": "1" * 64},
            r"intermediate was trained with another tokenizer.*force=intermediate",
        ),
        ("intermediate", {"chat_template": "1" * 64}, "intermediate was trained with another chat template"),
        ("eagle-intermediate", {"model_files": {}}, r"head was trained on another intermediate: .*\(force=eagle\)"),
        ("eagle-intermediate", {"tokenizer": "1" * 64}, "head was trained with another tokenizer"),
    ],
)
def test_a_drafter_of_something_else_makes_no_bundle(
    make: Make, finish: Make, role: str, fields: dict[str, Any], message: str
) -> None:
    bundle = make(owners={role: fields})
    with pytest.raises(BundleError, match=message):
        finish(bundle)


def test_another_intermediate_under_a_head_is_found_even_with_matching_digests(
    make: Make, finish: Make, tiny: Any
) -> None:
    bundle = finish(make())
    tiny.model(bundle / "intermediate", tiny.config() | {"num_hidden_layers": 1}, tiny.Quantized(), seed=6)
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name, record in manifest["files"].items():
        record.update(bytes=(bundle / name).stat().st_size, sha256=sha256_file(bundle / name))
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    (problem,) = verify_bundle(bundle)
    assert "eagle-intermediate: the head was trained on another intermediate: model.safetensors was" in problem


def test_another_draft_vocabulary_is_no_other_intermediate(make: Make, finish: Make) -> None:
    bundle = make()
    write_draft_vocabulary(bundle / "intermediate", IDS[:4])
    assert verify_bundle(finish(bundle)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 262}, "intermediate: vocab_size is 262, the target's 263"),
        ({"max_position_embeddings": 64}, "intermediate: reads 64 tokens, the target 128"),
    ],
)
def test_an_intermediate_too_small_for_the_target_is_refused(
    make: Make, finish: Make, changes: dict[str, Any], message: str
) -> None:
    bundle = make(ids=None, **changes)
    with pytest.raises(ValueError, match=message):
        finish(bundle, ("target", "intermediate"))


def test_a_head_without_its_intermediate_is_refused(make: Make, finish: Make) -> None:
    bundle = make()
    with pytest.raises(BundleError, match="'eagle-intermediate' drafts for an intermediate, and there is none"):
        finish(bundle, ("target", "eagle-target", "eagle-intermediate"))


@pytest.mark.parametrize("name", ["training.json", VOCABULARY_FILE])
def test_a_damaged_record_is_named(make: Make, finish: Make, name: str) -> None:
    bundle = make()
    (bundle / "intermediate" / name).write_text("{}")
    with pytest.raises(ValueError, match=f"intermediate/{name}"):
        finish(bundle)


def test_an_intermediate_without_its_record_is_refused(make: Make, finish: Make) -> None:
    bundle = make()
    (bundle / "intermediate" / "training.json").unlink()
    with pytest.raises(ValueError, match=r"training\.json: no such file"):
        finish(bundle)
