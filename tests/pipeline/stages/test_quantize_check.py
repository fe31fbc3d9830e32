"""What is refused of a method before any work, under which key, and what its artifact's key holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from compress.target.sources import Source
from pipeline.cli import config_directory
from pipeline.graph import Stage, order_stages
from pipeline.schema import register
from pipeline.stages.graph import build_graph
from pipeline.stages.graph_models import quantize_stage
from pipeline.stages.quantize_check import check, check_calibration

FLATTENED = {"alpha": None, "beta": 1.3, "max_expansion": 1.5}
LLM_COMPRESSOR = {"torch", "transformers", "llmcompressor", "compressed-tensors"}


def no_shape() -> Any:
    raise AssertionError("a bad number needs no model")


def test_a_gamma_below_0_is_refused() -> None:
    config = {"method": "flattenquant", **FLATTENED, "gamma": -1.0, "int4_share": None}
    with pytest.raises(ValueError, match=r"^key\.gamma=-1\.0 must be 0 \(8 bits everywhere\) or more$"):
        check(config, no_shape, "key")


def test_no_group_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^key\.calibration=\[\] names no group of samples; null takes all"):
        check_calibration({"method": "gptq", "calibration": [], "num_samples": None}, {}, "key")


def stages(*overrides: str) -> dict[str, Stage]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config: Any = compose("config", [*overrides, "eagle=none", "intermediate=none"])
    return {stage.instance: stage for stage in order_stages(build_graph(config))}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quality.variants.rtn.bits=3", r"^quality\.variants\.rtn\.bits=3 is not supported"),
        ("quality.variants.rtn.group_size=128", r"^quality\.variants\.rtn\.group_size=128 does not divide"),
        (
            "quality.variants.rtn.observer=imatrix_mse",
            r"^quality\.variants\.rtn\.observer=imatrix_mse .* minmax or mse$",
        ),
    ],
)
def test_a_variant_is_named_by_its_own_key(override: str, message: str) -> None:
    stage = stages(override)["quantize-rtn"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=message):
        stage.check(stage.config)


def test_samples_that_a_variant_asks_for_in_vain_are_named_by_its_own_key() -> None:
    stage = stages("quality=methods", "quality.variants.gptq_all.num_samples=999")["quantize-gptq_all"]
    assert stage.check is not None
    with pytest.raises(ValueError, match=r"^quality\.variants\.gptq_all\.num_samples=999: calibrate makes only"):
        stage.check(stage.config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"method": "keep", "twin": False}, {"gguf"}),
        ({"method": "keep", "twin": True}, {"gguf", *LLM_COMPRESSOR}),
        ({"method": "q4_0"}, {"gguf"}),
        ({"method": "gptq"}, LLM_COMPRESSOR),
        ({"method": "smoothquant", "twin": True}, LLM_COMPRESSOR),
    ],
)
def test_the_key_has_the_packages_that_make_the_model_and_its_twin(config: dict[str, Any], expected: set[str]) -> None:
    source = Source("gguf", Path("model.gguf"), "x")
    assert set(quantize_stage("", config, source, {}, lambda _config: None).packages) == expected
