"""The peer of benchmarks/eagle_step.py: the same EAGLE-3 training step as one writes it in plain torch.

Standard modules, batches padded to their longest conversation, autograd through torch's own operations: how the
published trainers do it (speculators, SpecForge), and like theirs its target distribution is computed once for all
steps and restricted to the draft vocabulary. The maths is that of train/eagle, which a test proves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.formats.eagle_config import EagleConfig
from train.eagle.rope import rope_tables
from train.loop.batches import Batch


class PlainAttention(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.shape = shape = config.layer
        num_q, num_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(2 * shape.hidden_size, num_q, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden_size, num_kv, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden_size, num_kv, bias=False)
        self.o_proj = nn.Linear(num_q, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x: [B, N, 2H]. cache: keys and values of the steps before, [B, heads, N, d]; this step's are appended."""
        shape = self.shape
        query = self._heads(self.q_proj(x), shape.num_heads)
        key = self._heads(self.k_proj(x), shape.num_kv_heads)
        value = self._heads(self.v_proj(x), shape.num_kv_heads)
        cosine, sine = (torch.cat([table, table], -1) for table in rope_tables(shape, positions))
        query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
        group = shape.num_heads // shape.num_kv_heads
        cache.append((key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
        if len(cache) == 1:
            attended = functional.scaled_dot_product_attention(query, *cache[0], is_causal=True)
        else:
            attended = self._attend(query, cache)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, self.shape.head_dim)).transpose(1, 2)

    def _attend(self, query: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Causal over step 0's keys, and the diagonal of every later step's."""
        length, size = query.shape[2:]
        scale = size**-0.5
        future = torch.full((length, length), -torch.inf).triu(1)
        scores = [query @ cache[0][0].transpose(2, 3) * scale + future]
        scores += [(query * key).sum(-1, keepdim=True) * scale for key, _ in cache[1:]]
        shares = torch.cat(scores, -1).softmax(-1)
        attended = shares[..., :length] @ cache[0][1]
        for index, (_, value) in enumerate(cache[1:]):
            attended = attended + shares[..., length + index, None] * value
        return attended


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class PlainMlp(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        shape = config.layer
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainLayer(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        shape = config.layer
        self.norm_before_residual = config.norm_before_residual
        self.self_attn, self.mlp = PlainAttention(config), PlainMlp(config)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, embedding: Tensor, state: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        normalized = self.hidden_norm(state)
        residual = normalized if self.norm_before_residual else state
        x = torch.cat([self.input_layernorm(embedding), normalized], -1)
        x = residual + self.self_attn(x, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainEagle(nn.Module):
    """The head, with the parameter names of train.eagle.head.EagleHead."""

    def __init__(self, config: EagleConfig, embedding: Tensor) -> None:
        super().__init__()
        shape = config.layer
        self.embedding = embedding
        self.fc = nn.Linear(len(config.feature_layers) * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.Sequential(PlainLayer(config))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, config.draft_vocab_size, bias=False)


class PlainBatch:
    """Conversations padded to the longest. token_ids, loss_mask: [B, N]. features: [B, N, L, H], the last of the L
    states being what enters the target's final norm."""

    def __init__(self, batch: Batch) -> None:
        assert batch.features is not None
        lengths = batch.starts.diff().tolist()
        self.token_ids = nn.utils.rnn.pad_sequence(batch.token_ids.split(lengths), batch_first=True)
        self.loss_mask = nn.utils.rnn.pad_sequence(batch.loss_mask.split(lengths), batch_first=True)
        self.features = nn.utils.rnn.pad_sequence(batch.features.split(lengths), batch_first=True)


def _shifted(x: Tensor, count: int) -> Tensor:
    """x [B, N, …] moved `count` places to the left, zeros behind."""
    return torch.cat([x[:, count:], torch.zeros_like(x[:, :count])], 1)


def plain_loss(
    head: PlainEagle,
    batch: PlainBatch,
    *,
    target_norm: nn.RMSNorm,
    target_rows: Tensor,
    in_vocabulary: Tensor,
    num_steps: int,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted losses of all counted drafts, and their number."""
    with torch.no_grad():
        distribution = (target_norm(batch.features[:, :, -1]) @ target_rows.t()).softmax(-1)
    counted = in_vocabulary[batch.token_ids]
    state = head.fc(batch.features[:, :, :-1].flatten(2))
    embeddings = head.embedding[batch.token_ids]
    written = torch.ones_like(batch.loss_mask)
    total, count = state.new_zeros(()), state.new_zeros(())
    cache: list[tuple[Tensor, Tensor]] = []
    positions = torch.arange(batch.token_ids.shape[1])
    for step in range(num_steps):
        state = head.layers[0](_shifted(embeddings, 1 + step), state, positions + step, cache)
        log_draft = head.lm_head(head.norm(state)).log_softmax(-1)
        written = written & _shifted(batch.loss_mask, 2 + step)
        mask = written & _shifted(counted, 2 + step)
        losses = -(_shifted(distribution, 1 + step) * log_draft).sum(-1)
        total = total + decay**step * (losses * mask).sum()
        count = count + mask.sum()
    return total, count
