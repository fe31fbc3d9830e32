"""The training-time test's forward pass (EAGLE-3, arXiv 2503.01840, section 3.1): every chain of a batch, k steps long.

Step 0 reads the target's fused states at all tokens; its keys and values serve every later step. Step j reads the
layer's own output of step j − 1 and the text's next token (teacher forcing): while a chain's drafts match the text,
this is exactly what the head computes when it drafts on its own (train/eagle/rollout.py).

Two things are arranged for speed, both exact. A norm's weight is multiplied into the matrix after it, so that no pass
over the activations is needed for it. And the embeddings' half of q, k and v is computed once for all steps: a token's
embedding is read by several steps and never learned.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from train.chains import Chains
from train.eagle.attention import attend
from train.eagle.head import EagleHead
from train.eagle.rope import rope_tables
from train.elementwise import rms_normalize, rotate, swiglu
from train.loop.batches import Batch
from train.products import linear


@dataclass(frozen=True)
class _Weights:
    """The decoder layer's matrices, joined where they read the same input, with the norm before them multiplied in.

    embedding_qkv, state_qkv: [(heads + 2 kv_heads) · d, H], the halves of q, k and v that read the embedding and the
    state. output: [H, heads · d]. gate_up: [2I, H]. down: [H, I].
    """

    embedding_qkv: Tensor
    state_qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, head: EagleHead) -> "_Weights":
        layer = head.layer
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        embedding_qkv, state_qkv = qkv.chunk(2, dim=1)
        return cls(
            embedding_qkv=embedding_qkv * layer.input_layernorm.weight,
            state_qkv=state_qkv * layer.hidden_norm.weight,
            output=attention.o_proj.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight,
            down=mlp.down_proj.weight,
        )


class _Unroller:
    """One batch's unrolled steps. features: [T, L · H]."""

    def __init__(self, head: EagleHead, batch: Batch, features: Tensor, chains: Chains) -> None:
        self.head, self.batch, self.chains = head, batch, chains
        self.shape = head.config.layer
        self.weights = _Weights.of(head)
        self.features = features
        embeddings = head.embed_tokens.weight[batch.token_ids].float()
        self.embedded = linear(rms_normalize(embeddings, self.shape.rms_norm_eps), self.weights.embedding_qkv)

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Step 0: the chains' states [C, H], and keys and values of all tokens [T, kv_heads, d]."""
        num_tokens, rows = len(self.batch.token_ids), self.chains.rows
        next_tokens = torch.arange(1, num_tokens + 1, device=rows.device).clamp_(max=num_tokens - 1)
        fused = linear(self.features, self.head.fc.weight).to(self.head.fc.weight.dtype)
        normalized = rms_normalize(fused, self.shape.rms_norm_eps)
        queries, keys, values = self._queries_keys_values(normalized, next_tokens, self.batch.position)
        attended = attend(queries[rows], keys, values, [], [], self.chains)
        return self._finish(attended, fused[rows], normalized[rows]), keys, values

    def later(
        self, step: int, state: Tensor, keys: Tensor, values: Tensor, *own: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step ≥ 1 from the last step's states; own: the chains' keys, then their values, of steps 1 … step − 1.

        Returns the states [C, H], and this step's keys and values [C, kv_heads, d].
        """
        num_own = len(own) // 2
        read = self.chains.read_tokens(step, len(self.batch.token_ids))
        position = self.batch.position[self.chains.rows] + step
        normalized = rms_normalize(state, self.shape.rms_norm_eps)
        queries, key, value = self._queries_keys_values(normalized, read, position)
        own_keys, own_values = [*own[:num_own], key], [*own[num_own:], value]
        attended = attend(queries, keys, values, own_keys, own_values, self.chains)
        return self._finish(attended, state, normalized), key, value

    def _queries_keys_values(self, state: Tensor, read: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (divided by √d), k and v of normalized states [n, H] that each read the embedding of token `read` [n]."""
        shape = self.shape
        joined = linear(state, self.weights.state_qkv) + self.embedded[read]
        num_heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        queries, keys, values = joined.view(len(state), sum(num_heads), shape.head_dim).split(num_heads, dim=1)
        cosine, sine = (table.unsqueeze(1).to(joined.dtype) for table in rope_tables(shape, position))
        scale = shape.head_dim**-0.5
        return rotate(queries, cosine * scale, sine * scale), rotate(keys, cosine, sine), values

    def _finish(self, attended: Tensor, state: Tensor, normalized: Tensor) -> Tensor:
        """The layer's output [C, H] from its attention [C, heads, d] and its input."""
        weights = self.weights
        is_normed = self.head.config.norm_before_residual
        residual = normalized * self.head.layer.hidden_norm.weight if is_normed else state
        residual = residual + linear(attended.flatten(1), weights.output)
        gate_up = linear(rms_normalize(residual, self.shape.rms_norm_eps), weights.gate_up)
        return residual + linear(swiglu(gate_up), weights.down)


def unroll(head: EagleHead, batch: Batch, features: Tensor, chains: Chains) -> Tensor:
    """States of every chain at every step, ready for lm_head: after the final norm.

    features: float [T, L · H], the states of the head's feature layers side by side. Returns [k, C, H].
    """
    unroller = _Unroller(head, batch, features, chains)
    state, keys, values = unroller.first()
    states, own_keys, own_values = [state], list[Tensor](), list[Tensor]()
    for step in range(1, chains.num_steps):
        inputs = (state, keys, values, *own_keys, *own_values)
        run = partial(unroller.later, step)
        if head.recomputes_activations and torch.is_grad_enabled():
            state, key, value = checkpoint(run, *inputs, use_reentrant=False)
        else:
            state, key, value = run(*inputs)
        states.append(state)
        own_keys.append(key)
        own_values.append(value)
    return rms_normalize(torch.stack(states), head.config.layer.rms_norm_eps) * head.norm.weight
