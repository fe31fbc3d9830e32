"""The EAGLE-3 head (arXiv 2503.01840): three of the target's hidden states fused, one decoder layer, a trimmed lm_head.

Parameters carry the names of the tensors in the exported file (deploy/formats/speculators.py). The decoder layer is a
Llama layer whose q, k and v read [norm(embedding), norm(state)]. Later drafted tokens read the layer's own output in
place of the fused state; the final norm stands only before lm_head.

Deviations: a head that reads one state (`feature_layers=[num_layers]`, EAGLE-1 and -2's feature) is this class with a
narrower fc, not those papers' fc over [embedding; feature]; and it is trained by the same objective.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig

T = TypeVar("T")


class _Weight(nn.Module):
    """A named weight, for use in products with other weights."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class _FrozenWeight(nn.Module):
    """The target's, never trained and no part of the head's state."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)


class _Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        num_q, num_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = _Weight(num_q, 2 * shape.hidden_size)
        self.k_proj = _Weight(num_kv, 2 * shape.hidden_size)
        self.v_proj = _Weight(num_kv, 2 * shape.hidden_size)
        self.o_proj = _Weight(shape.hidden_size, num_q)


class _Mlp(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = _Weight(shape.intermediate_size, shape.hidden_size)
        self.up_proj = _Weight(shape.intermediate_size, shape.hidden_size)
        self.down_proj = _Weight(shape.hidden_size, shape.intermediate_size)


class DecoderLayer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = _Weight(shape.hidden_size)
        self.hidden_norm = _Weight(shape.hidden_size)
        self.post_attention_layernorm = _Weight(shape.hidden_size)


class EagleHead(nn.Module):
    """config: its shape. embedding: the target's, float [V, H]; kept as it is, and not in `state_dict()`.

    Parameters start as transformers starts a Llama's: normal with deviation 0.02, norms 1 (see train/eagle/initial.py).
    """

    def __init__(self, config: EagleConfig, embedding: Tensor) -> None:
        super().__init__()
        shape = config.layer
        self.config = config
        self.embed_tokens = _FrozenWeight(embedding)
        self.fc = _Weight(shape.hidden_size, shape.hidden_size * len(config.feature_layers))
        self.layers = nn.ModuleList([DecoderLayer(shape)])
        self.norm = _Weight(shape.hidden_size)
        self.lm_head = _Weight(config.draft_vocab_size, shape.hidden_size)
        self.recomputes_activations = False
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def layer(self) -> DecoderLayer:
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        return layer

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each step's input for the backward pass, and compute the rest again."""
        self.recomputes_activations = True

    def forward(self, compute: Callable[["EagleHead"], T]) -> T:
        """compute(self). Distributed and mixed-precision wrappers act on `forward`: what is differentiated goes
        through here."""
        return compute(self)
