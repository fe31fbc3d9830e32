"""What is planned is what config.json then says."""

import pytest

from deploy.formats.architectures import ModelShape
from train.intermediate.shapes import (
    Sizes,
    choose_layers,
    layers_config,
    layers_shape,
    random_config,
    random_shape,
)

TARGET = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 7,
    "eos_token_id": 2,
}
SIZES = Sizes(3, 64, 96, 2, 1, 32, ties_embeddings=False, projects_embedding=True)


@pytest.mark.parametrize(
    ("num_layers", "chosen", "num_kept", "expected"),
    [
        (30, None, 6, (0, 1, 2, 3, 4, 5)),
        (30, None, 1, (0,)),
        (5, None, 5, (0, 1, 2, 3, 4)),
        (30, [-1, 0, 7], None, (0, 7, 29)),
    ],
)
def test_layers_are_the_first_ones_or_as_asked(
    num_layers: int, chosen: list[int] | None, num_kept: int | None, expected: tuple[int, ...]
) -> None:
    assert choose_layers(num_layers, chosen, num_kept) == expected


@pytest.mark.parametrize(
    ("chosen", "num_kept", "message"),
    [
        (None, None, "layers=None with num_layers=None: give one"),
        ([0], 1, r"layers=\[0\] with num_layers=1: give one of the two"),
        (None, 0, "num_layers=0 must lie between 1 and 5"),
        (None, 6, "num_layers=6 must lie between 1 and 5"),
        ([5], None, r"layers=\[5\] must name different ones of 0 to 4"),
        ([-6], None, r"layers=\[-6\] must name"),
        ([4, -1], None, r"layers=\[4, -1\] must name"),
        ([], None, r"layers=\[\] must name"),
    ],
)
def test_layers_that_do_not_exist_are_refused(chosen: list[int] | None, num_kept: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layers(5, chosen, num_kept)


@pytest.mark.parametrize("unties", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_of_some_layers_is_that_of_their_configuration(tied: bool, unties: bool) -> None:
    source = {**TARGET, "tie_word_embeddings": tied}
    shape = layers_shape(ModelShape.from_config(source), 3, 70, unties=unties)
    assert shape == ModelShape.from_config(layers_config(source, 3, 70, unties=unties))
    assert shape.tied_embeddings == (tied and not unties)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "qwen3", "head_dim": 32},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
)
def test_the_shape_of_a_random_model_is_that_of_its_configuration(changes: dict[str, object]) -> None:
    target = TARGET | changes
    shape = random_shape(ModelShape.from_config(target), SIZES)
    assert shape == ModelShape.from_config(random_config(target, SIZES))
    assert shape.model_type == "llama"
