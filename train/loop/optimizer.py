"""What turns gradients into updates: AdamW, or Muon for matrices between a model's layers and AdamW for the rest.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
orthogonal matrix, so that no direction of it learns much faster than another. Its updates are scaled to AdamW's size
(Liu et al., arXiv 2502.16982, section 2.2), so that one learning rate fits both. Embeddings and lm_heads, whose rows
are tokens, stay AdamW's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.loop.model_state import trained_parameters
from train.loop.settings import OPTIMIZERS

TOKEN_MATRICES = ("embed_tokens", "lm_head")
"""Modules whose weights have one row a token."""
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of one step, steepest at zero: five steps bring singular values above 0.003 of the matrix's norm to
between 0.68 and 1.2."""
NUM_STEPS = 5
ADAMW_SIZE = 0.2
"""Root mean square of AdamW's usual updates, in learning rates."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly the nearest matrices with orthogonal rows of length 1 (or columns, where these are fewer): [n, A, B]."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min_(1e-7)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x


class Muon(torch.optim.Optimizer):
    """For matrices alone. dtype: of the products that make momentum orthogonal.

    torch.optim.Muon always multiplies in bfloat16, which some processors only emulate, and matrix by matrix.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, weight_decay: float, dtype: torch.dtype) -> None:
        self._dtype = dtype
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient. closure: torch's interface has one; here there is none."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        """parameters: of one shape."""
        gradients = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            gradients.append(parameter.grad.lerp(state["momentum"], MOMENTUM))  # Nesterov's
        updates = orthogonalize(torch.stack(gradients).to(self._dtype))
        size = learning_rate * ADAMW_SIZE * max(parameters[0].shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - learning_rate * weight_decay).add_(update, alpha=-size)


class Optimizer:
    """One step for all trained parameters of `model`.

    kind: adamw or muon; Muon knows matrices of tokens by their modules' names (TOKEN_MATRICES). betas: AdamW's.
    weight_decay: on matrices; vectors (norms, biases) are never decayed. dtype: Muon's.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert kind in OPTIMIZERS, kind
        self._parameters = trained_parameters(model)
        orthogonal = [name for name in self._parameters if kind == "muon" and self._is_between_layers(name)]
        matrices = [name for name, value in self._parameters.items() if value.ndim >= 2 and name not in orthogonal]
        vectors = [name for name, value in self._parameters.items() if value.ndim < 2]
        decayed = [(matrices, weight_decay), (vectors, 0.0)]
        groups = [{"params": self._of(names), "weight_decay": decay} for names, decay in decayed if names]
        self._parts: list[torch.optim.Optimizer] = []
        if groups:
            self._parts.append(torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True))
        if orthogonal:
            self._parts.append(Muon(self._of(orthogonal), weight_decay=weight_decay, dtype=dtype))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self._parts:
            part.zero_grad()

    def step(self, learning_rate: float) -> None:
        """Update every parameter from its gradient."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, `<parameter>:<entry>`, on the CPU."""
        return {
            f"{name}:{entry}": tensor.detach().cpu().contiguous()
            for name, parameter in self._parameters.items()
            for part in self._parts
            for entry, tensor in part.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Give this fresh optimizer a copy of what `state` gave."""
        by_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, entry = key.rpartition(":")
            by_parameter.setdefault(self._parameters[name], {})[entry] = tensor.clone()
        for part in self._parts:
            order = [parameter for group in part.param_groups for parameter in group["params"]]
            indexed = {index: by_parameter[value] for index, value in enumerate(order) if value in by_parameter}
            part.load_state_dict({"state": indexed, "param_groups": part.state_dict()["param_groups"]})

    def _is_between_layers(self, name: str) -> bool:
        return self._parameters[name].ndim == 2 and not any(part in TOKEN_MATRICES for part in name.split("."))

    def _of(self, names: list[str]) -> list[nn.Parameter]:
        return [self._parameters[name] for name in names]
