"""Trained parameters as a flat dictionary of tensors, which safetensors can hold."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; one that is used twice is there once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, by name, on the CPU. Frozen parameters are not part of it."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in (trained_parameters(model) | buffers).items()}


@torch.no_grad()
def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `trained_state` gave into the model's own tensors. Raises ValueError when names or shapes differ."""
    own = dict(model.named_buffers(remove_duplicate=False)) | trained_parameters(model)
    expected = {name: tensor.shape for name, tensor in trained_state(model).items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    if expected != found:
        name = sorted(name for name in expected | found if expected.get(name) != found.get(name))[0]
        raise ValueError(
            f"the checkpoint's {name} is {_shape(found.get(name))} and the model's {_shape(expected.get(name))}; "
            f"train into an empty directory"
        )
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
