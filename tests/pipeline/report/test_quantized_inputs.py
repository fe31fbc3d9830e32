"""What the documents say of quantized inputs, and of programs that cannot load them."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.formats.activations import ActivationGrid
from deploy.formats.quantization_config import Quantization, QuantizationGroup
from pipeline.report.quantized_inputs import error_cells, summary_lines, vllm_obstacle

TOKEN_8, TENSOR_8, TENSOR_4 = ActivationGrid(8, "token"), ActivationGrid(8, "tensor"), ActivationGrid(4, "tensor")


def layer(bits: int, error: float, saturation: float | None) -> dict[str, Any]:
    return {"bits": bits, "columns": 640, "error": error, "inputs_error": error / 2, "saturation": saturation}


STATS = {
    "inputs": {
        "int4_share": 0.4829,
        "expansion": 1.218,
        "alpha": 0.5,
        "alpha_kl": {"0.5": 0.01, "0.7": 0.0212},
        "saturation": 0.0001,
        "saturation_worst": 0.003,
    },
    "layers": {
        f"model.layers.{index}.{name}": layer(4 if index else 8, 0.1 * (index + 1), 0.001 * index)
        for index in range(2)
        for name in (
            *(f"self_attn.{kind}_proj" for kind in "qkvo"),
            *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    },
}


def test_the_figures_are_told_in_sentences() -> None:
    text = " ".join(summary_lines(STATS))
    for part in ("48.3%", "1.218 times", "α: 0.5; KL of those tried: 0.5 0.0100, 0.7 0.0212", "0.0100%", "0.3000%"):
        assert part in text


def test_errors_are_told_by_kind_of_layer() -> None:
    heading, *rows = error_cells(STATS)
    assert len(rows) == 7
    assert dict(zip(heading, rows[0], strict=True)) == {
        "layers": "q_proj",
        "4-bit": "1 of 2",
        "columns": "640",
        "output error": "0.1500",
        "worst": "0.2000",
        "input error": "0.0750",
        "beyond scale": "0.0500%",
    }


def test_where_inputs_are_left_to_the_runtime_nothing_is_said() -> None:
    assert summary_lines({"bits_per_weight": 4.5}) == []
    assert error_cells({"bits_per_weight": 4.5}) == []


def group(bits: int, group_size: int | None, *, symmetric: bool = True, **fields: Any) -> QuantizationGroup:
    return QuantizationGroup(("Linear",), bits, group_size, symmetric, **fields)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (group(4, 32), None),
        (group(8, None, activations=TOKEN_8), None),
        (group(8, None, activations=TENSOR_8), None),
        (group(4, 32, symmetric=False, float_minimum=True), "weight_min"),
        (group(8, None, activations=TENSOR_8, flatten=True), "input_flatten"),
        (group(4, None, activations=TENSOR_4), "inputs have 4 bits"),
        (group(4, 32, activations=TOKEN_8), "packed"),
        (group(8, 32, activations=TOKEN_8), "scale per output channel"),
        (group(8, None, symmetric=False, activations=TOKEN_8), "symmetric"),
    ],
)
def test_why_vllm_does_not_load_a_model(found: QuantizationGroup, word: str | None) -> None:
    told = vllm_obstacle(Quantization((found,)))
    assert (told is None) if word is None else (told is not None and word in told)


def test_a_plain_model_has_no_obstacle() -> None:
    assert vllm_obstacle(None) is None
