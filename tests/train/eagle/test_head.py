"""The head's state and its file's contract."""

from typing import Any

import pytest

from deploy.formats.speculators import tensor_contract


@pytest.mark.parametrize("feature_layers", [(1, 3, 5), (6,)])
def test_the_state_is_the_files_weights_by_name_and_shape(eagle: Any, feature_layers: tuple[int, ...]) -> None:
    head = eagle.head(feature_layers=feature_layers)
    contract = {name: size for name, (kind, size) in tensor_contract(head.config).items() if kind == "BF16"}
    assert {name: tuple(weight.shape) for name, weight in head.state_dict().items()} == contract


def test_the_embedding_is_not_trained(eagle: Any) -> None:
    head = eagle.head()
    assert not head.embed_tokens.weight.requires_grad
    assert all(parameter.requires_grad for parameter in head.parameters())
