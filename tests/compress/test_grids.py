"""The check of a group size against every layer's width."""

from __future__ import annotations

import re
from typing import Any

import pytest

from compress.grids import check_group_size
from deploy.formats.architectures import ModelShape


def shape(tiny: Any, **changes: Any) -> ModelShape:
    return ModelShape.from_config(tiny.Shape(**changes).config())


@pytest.mark.parametrize(
    ("changes", "group_size"),
    [({}, 32), ({"hidden": 128, "inner": 384, "heads": 8}, 128), ({"hidden": 576, "inner": 1536, "heads": 36}, 64)],
)
def test_a_size_that_divides_every_width_passes(tiny: Any, changes: dict[str, Any], group_size: int) -> None:
    check_group_size(shape(tiny, **changes), group_size)


def test_a_misfit_names_key_value_layers_and_the_sizes_that_fit(tiny: Any) -> None:
    expected = (
        "quantize.group_size=128 does not divide in_features=576 (layers: model.layers.*.mlp.gate_proj,"
        " model.layers.*.mlp.up_proj, model.layers.*.self_attn.k_proj, model.layers.*.self_attn.o_proj,"
        " model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj); use 64 or 32"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_group_size(shape(tiny, hidden=576, inner=1536, heads=36), 128)


def test_each_misfitting_width_is_listed(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"in_features=96 .*; in_features=160 \(layers: .*down_proj\); use 32$"):
        check_group_size(shape(tiny), 64)


def test_a_model_that_no_size_fits_is_said_to_be_one(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"in_features=100 .*this model's widths fit no supported group size"):
        check_group_size(shape(tiny, inner=100), 32)
