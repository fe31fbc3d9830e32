"""`GpuEagle`: an EAGLE-3 head on the device of the model that it drafts for, from whose states it drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy.formats.eagle_config import EagleConfig
from deploy.formats.speculators import EagleDirectory
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_forward import Stream, check_shape, run_layer, write_chain
from deploy.runtime.gpu_graphs import Computed
from deploy.runtime.gpu_inputs import RowInputs
from deploy.runtime.gpu_loader import load_eagle, too_large
from deploy.runtime.gpu_model import Float32, GpuModel
from deploy.runtime.gpu_weights import Head


class GpuEagle(GpuModel):
    """DraftModel (see deploy/runtime/drafters/base.py): docs/numerics.md, *EAGLE head*, in its `bf16` form.

    weights: on the device of the target, whose embedding it reads unless the head has a copy.
    """

    def __init__(self, config: EagleConfig, weights: Head, target: GpuBackend) -> None:
        super().__init__(target.device, config.layer, weights, weights.head_ids, len(config.feature_layers))
        self.weights, self._config, self._target = weights, config, target

    @classmethod
    def open(cls, head: EagleDirectory, target: GpuBackend) -> GpuEagle:
        """A head of a directory. Raises ValueError for one that does not fit the target."""
        head.config.check_target(target.shape)
        check_shape(head.config.layer)
        device = target.device
        try:
            weights = load_eagle(head, device.torch_device, device.dtype)
        except torch.OutOfMemoryError as error:
            raise MemoryError(too_large(head.path)) from error
        return cls(head.config, weights, target)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the target whose states its rows read."""
        return self._config.feature_layers

    @property
    def drafted_offset(self) -> int:
        return 2

    def read_states(self, features: Float32) -> Tensor:
        """The features of several layers as one state, fp32 [rows, hidden]."""
        side_by_side = torch.from_numpy(features).to(self.device.torch_device, self.device.dtype)
        return self.device.ops.linear(side_by_side.contiguous(), self.weights.fc, torch.float32)

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.weights.embedding is None:
            return self._target.embed(tokens)
        return self.device.ops.embedding(tokens, self.weights.embedding)

    def _forward(
        self, inputs: RowInputs, taps: tuple[int, ...], head_rows: Tensor | None, *, has_head: bool
    ) -> Computed:
        ops, weights, context = self.device.ops, self.weights, self._context
        eps, dtype = self._shape.rms_norm_eps, self.device.dtype
        write_chain(self._cache, inputs)
        embedded = ops.rms_norm(self._embed(inputs.tokens), weights.layer.input_norm, eps, dtype)
        state = ops.rms_norm(inputs.states, weights.hidden_norm, eps, torch.float32)
        joined = torch.cat((embedded, state.to(dtype)), dim=1)
        stream = Stream(state if self._config.norm_before_residual else inputs.states.clone())
        run_layer(context, 0, weights.layer, inputs, stream, joined)
        normed = stream.norm(context, weights.norm, dtype)
        if not has_head:
            return Computed(stream.residual, None, None, {})
        asked = normed if head_rows is None else normed[head_rows]
        return Computed(stream.residual, *self.head(asked, weights.head), {})
