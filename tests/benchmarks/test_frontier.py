"""What each point of the frontier asks of the pipeline."""

from __future__ import annotations

import pytest

from benchmarks.frontier import choices_of_bits, configuration
from pipeline.graph import order_stages
from pipeline.schema import register
from pipeline.stages.graph import build_graph


@pytest.mark.parametrize(
    ("gammas", "expected"), [(None, [(0.0, None), (0.4829, None)]), ([0.2, 0.28], [(None, 0.2), (None, 0.28)])]
)
def test_every_point_is_a_configuration_that_quantize_takes(
    gammas: list[float] | None, expected: list[tuple[float | None, float | None]]
) -> None:
    register()
    found = []
    for chosen in choices_of_bits([0.0, 0.4829], gammas):
        config = configuration("stage=quality", "quantize=flattenquant", *chosen)
        stages = {stage.instance: stage for stage in order_stages(build_graph(config))}
        quantize = stages["quantize"]
        assert quantize.check is not None
        quantize.check(quantize.config)
        found.append((quantize.config["int4_share"], quantize.config["gamma"]))
    assert found == expected
