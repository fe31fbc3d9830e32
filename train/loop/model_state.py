"""Trained parameters and optimizer state as flat dictionaries of tensors, which safetensors can hold."""

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


def make_optimizer(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters; only matrices are decayed. The learning rate is set at every step."""
    parameters = list(trained_parameters(model).values())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, `<parameter>:<entry>`, on the CPU."""
    return {
        f"{name}:{entry}": tensor.detach().cpu().contiguous()
        for name, parameter in trained_parameters(model).items()
        for entry, tensor in optimizer.state[parameter].items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a fresh optimizer a copy of the state that `optimizer_state` gave."""
    parameters = trained_parameters(model)
    by_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, entry = key.rpartition(":")
        by_parameter.setdefault(parameters[name], {})[entry] = tensor.clone()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indexed = {index: by_parameter[parameter] for index, parameter in enumerate(order) if parameter in by_parameter}
    optimizer.load_state_dict({"state": indexed, "param_groups": optimizer.state_dict()["param_groups"]})


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
