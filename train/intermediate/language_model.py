"""A causal language model of transformers, over packed conversations.

Conversations lie one after the other in one row; each attends to itself alone, by one call of attention for each, so
that no mask of [T, T] is made and no product is wasted on what it would hide.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from train.loop.batches import Batch
from train.products import num_missing, product_dtype

T = TypeVar("T")
PACKED = "understudy_packed"


class LanguageModel(nn.Module):
    """A model to be trained, or replayed.

    lm: a decoder-only model of transformers (`lm.model` gives the states after the final norm), whose attention is
    exchanged. trains_ends: whether embedding and lm_head are trained, too.
    """

    def __init__(self, lm: PreTrainedModel, *, trains_ends: bool = True) -> None:
        super().__init__()
        AttentionInterface.register(PACKED, _attend)
        lm.config._attn_implementation = PACKED
        self.lm = lm
        if not trains_ends:
            for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                module.requires_grad_(False)

    @property
    def head(self) -> Tensor:
        """lm_head's weight [V, H], the embedding where they are tied."""
        weight: Tensor = self.lm.get_output_embeddings().weight
        return weight

    def states(self, batch: Batch) -> Tensor:
        """Float [T, H]: every token's state, ready for lm_head."""
        decoder: Any = self.lm.model
        num_tokens, head = len(batch.token_ids), self.head
        missing = num_missing(num_tokens, head, product_dtype(head))  # filled up by a conversation that nobody reads
        starts = [*batch.starts.tolist(), *([num_tokens + missing] if missing else [])]
        found = decoder(
            input_ids=pad(batch.token_ids, (0, missing))[None],
            position_ids=pad(batch.position, (0, missing))[None],
            use_cache=False,
            cu_seq_lens_q=starts,
        )
        states: Tensor = found.last_hidden_state[0, :num_tokens]
        return states

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, compute: Callable[["LanguageModel"], T]) -> T:
        """compute(self). Distributed wrappers act on `forward`: what is differentiated goes through here."""
        return compute(self)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, **others: Any
) -> tuple[Tensor, None]:
    """Causal attention within each conversation. query: [1, heads, T, d]; key, value: [1, kv_heads, T, d].

    cu_seq_lens_q: where conversations begin, and T.
    """
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    parts = [
        scaled_dot_product_attention(
            query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end], is_causal=True, scale=scaling
        )
        for begin, end in pairwise(others["cu_seq_lens_q"])
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
