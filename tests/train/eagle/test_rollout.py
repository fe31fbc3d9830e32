"""Replayed acceptance against a head that really drafts on its own, token by token, with a growing cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, linear, rms_norm, silu

from train.chains import find_chains
from train.eagle.head import EagleHead
from train.eagle.rollout import HeldOut
from train.eagle.rope import rope_tables
from train.eagle.unroll import unroll
from train.replay import Acceptance


class NoisyFeatures:
    """Random states, the same for the same text."""

    layers = (1, 3, 5, 6)

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size

    def capture(self, sequences: Sequence[Any]) -> list[Any]:
        return [self._one(ids) for ids in sequences]

    def _one(self, ids: Any) -> Any:
        rng = np.random.default_rng([7, *ids.tolist()])
        return rng.standard_normal((len(ids), len(self.layers), self._hidden_size)).astype(np.float32)


class Drafter:
    """The head as a runtime runs it: one row at a time, its own output fed back, keys and values in a cache."""

    def __init__(self, head: EagleHead) -> None:
        self.head, self.shape = head, head.config.layer
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def row(self, state: torch.Tensor, token: int) -> tuple[torch.Tensor, int]:
        """One more row; returns the layer's output and the drafted token's place in the draft vocabulary."""
        head, shape, layer = self.head, self.shape, self.head.layer
        eps, hidden = shape.rms_norm_eps, (shape.hidden_size,)
        position = torch.tensor([len(self.keys)])
        cosine, sine = (torch.cat([table, table], -1) for table in rope_tables(shape, position))
        embedding = rms_norm(head.embed_tokens.weight[token], hidden, layer.input_layernorm.weight, eps)
        normalized = rms_norm(state, hidden, layer.hidden_norm.weight, eps)
        x = torch.cat([embedding, normalized])
        query = linear(x, layer.self_attn.q_proj.weight).view(shape.num_heads, -1)
        key = linear(x, layer.self_attn.k_proj.weight).view(shape.num_kv_heads, -1)
        self.keys.append(self._rotated(key, cosine, sine))
        self.values.append(linear(x, layer.self_attn.v_proj.weight).view(shape.num_kv_heads, -1))
        query = self._rotated(query, cosine, sine)
        group = shape.num_heads // shape.num_kv_heads
        keys = torch.stack(self.keys).repeat_interleave(group, 1)
        values = torch.stack(self.values).repeat_interleave(group, 1)
        shares = torch.einsum("hd,nhd->hn", query, keys).div(shape.head_dim**0.5).softmax(-1)
        attended = torch.einsum("hn,nhd->hd", shares, values).flatten()
        residual = normalized if head.config.norm_before_residual else state
        state = residual + linear(attended, layer.self_attn.o_proj.weight)
        inner = rms_norm(state, hidden, layer.post_attention_layernorm.weight, eps)
        mlp = silu(linear(inner, layer.mlp.gate_proj.weight)) * linear(inner, layer.mlp.up_proj.weight)
        state = state + linear(mlp, layer.mlp.down_proj.weight)
        return state, int(linear(rms_norm(state, hidden, head.norm.weight, eps), head.lm_head.weight).argmax())

    def truncate(self, length: int) -> None:
        del self.keys[length:], self.values[length:]

    def _rotated(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], -1) * sine


@torch.no_grad()
def speculate(
    head: EagleHead, text: Any, features: np.ndarray, draft_ids: Sequence[int], num_drafted: int
) -> tuple[int, int, list[int]]:
    """Decode a text again with drafts: rounds, tokens emitted, and accepted drafts of every round."""
    ids = text.token_ids.tolist()
    fused = linear(torch.from_numpy(features[:, :3]).flatten(1), head.fc.weight)
    rounds, emitted, accepted = 0, 0, []
    for begin, end in text.spans:
        drafter = Drafter(head)
        known = max(begin, 1) + 1  # the prompt and the first token, which reading the prompt gave
        while known < end:
            for row in range(len(drafter.keys), known - 1):
                state, draft = drafter.row(fused[row], ids[row + 1])
            length, drafts = len(drafter.keys), [draft_ids[draft]]
            while len(drafts) < num_drafted:
                state, draft = drafter.row(state, drafts[-1])
                drafts.append(draft_ids[draft])
            drafter.truncate(length)  # true states replace the head's own
            hits = 0
            while hits < num_drafted and known + hits < end and drafts[hits] == ids[known + hits]:
                hits += 1
            gained = min(hits + 1, end - known)
            rounds, emitted, known = rounds + 1, emitted + gained, known + gained
            accepted.append(hits)
    return rounds, emitted, accepted


def learn_texts(eagle: Any, head: EagleHead, texts: Sequence[Any], draft_ids: torch.Tensor, num_updates: int) -> None:
    """Teach the head the texts, half-way: so that chains of every length get accepted."""
    source = NoisyFeatures(head.config.layer.hidden_size)
    batch = eagle.pack(texts, source.capture([text.token_ids for text in texts]))
    chains = find_chains(batch, 3)
    drafted = torch.stack([chains.read_tokens(step, len(batch.token_ids)) + 1 for step in range(3)])
    tokens = batch.token_ids[drafted.clamp(max=len(batch.token_ids) - 1)]
    counted = chains.drafts_written & torch.isin(tokens, draft_ids)
    places = torch.searchsorted(draft_ids, tokens[counted])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(num_updates):
        optimizer.zero_grad()
        states = unroll(head, batch, batch.features[:, :3].flatten(1), chains)
        cross_entropy(linear(states[counted], head.lm_head.weight), places).backward()
        optimizer.step()


def repetitive_texts(eagle: Any, seed: int) -> list[Any]:
    """Texts of few different tokens; two turns, a response that ends the text, a text that is a response from its
    start, one-token responses."""
    spans = [[(9, 40)], [(4, 12), (20, 31)], [(0, 17)], [(5, 6), (9, 22)]]
    texts = eagle.conversations(seed, spans, [43, 31, 19, 22])
    for text in texts:
        text.token_ids[:] = text.token_ids % 7 * 5
    return texts


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("num_drafted", [1, 4])
def test_replay_counts_what_a_head_drafting_on_its_own_with_a_growing_cache_gets_accepted(
    eagle: Any, norm_before_residual: bool, num_drafted: int
) -> None:
    head = eagle.head(norm_before_residual=norm_before_residual, draft_size=37)
    draft_ids = torch.from_numpy(np.sort(np.random.default_rng(3).permutation(61)[:37])).long()
    texts = repetitive_texts(eagle, seed=num_drafted)
    learn_texts(eagle, head, texts, draft_ids, num_updates=25)
    source = NoisyFeatures(head.config.layer.hidden_size)
    found = HeldOut(texts, source, (0, 1, 2)).replay(head, draft_ids, num_drafted)
    rounds, emitted, accepted = 0, 0, []
    for text, features in zip(texts, source.capture([text.token_ids for text in texts]), strict=True):
        one = speculate(head, text, features, draft_ids.tolist(), num_drafted)
        rounds, emitted, accepted = rounds + one[0], emitted + one[1], accepted + one[2]
    assert (found.rounds, found.emitted) == (rounds, emitted)
    assert found.accepted == tuple(sum(hits > place for hits in accepted) for place in range(num_drafted))
    assert found.accepted[-1] > 0 and min(accepted) == 0, "the case must show rounds of different lengths"


def test_shares_by_position_are_conditional_on_the_drafts_before() -> None:
    counts = Acceptance(rounds=10, emitted=17, reached=(10, 6, 2), accepted=(6, 3, 1), written=20, outside_vocabulary=5)
    assert counts.by_position == (0.6, 0.5, 0.5)
    assert counts.metrics() == {
        "tau": 1.7,
        "acceptance_1": 0.6,
        "acceptance_2": 0.5,
        "acceptance_3": 0.5,
        "outside_vocabulary": 0.25,
    }


def test_a_place_of_a_chain_that_lies_behind_the_text_counts_as_neither_accepted_nor_rejected(eagle: Any) -> None:
    head = eagle.head()
    texts = eagle.conversations(0, [[(4, 6)]], [8])  # one token to draft
    found = HeldOut(texts, NoisyFeatures(24), (0, 1, 2)).replay(head, torch.arange(37), 4)
    assert (found.rounds, found.emitted) == (1, 1)
    assert found.reached == (1, 0, 0, 0)


def test_a_trimmed_vocabulary_drafts_as_a_head_with_only_those_rows(eagle: Any) -> None:
    head = eagle.head(draft_size=37)
    draft_ids = torch.from_numpy(np.sort(np.random.default_rng(3).permutation(61)[:37])).long()
    texts = repetitive_texts(eagle, seed=5)
    learn_texts(eagle, head, texts, draft_ids, num_updates=25)
    held_out = HeldOut(texts, NoisyFeatures(24), (0, 1, 2))
    kept = torch.tensor([0, 3, 4, 9, 11, 20, 21, 30, 36])
    trimmed = eagle.head(draft_size=len(kept))
    state = head.state_dict()
    trimmed.load_state_dict(state | {"lm_head.weight": state["lm_head.weight"][kept]})
    assert held_out.replay(head, draft_ids, 3, kept=kept) == held_out.replay(trimmed, draft_ids[kept], 3)


def test_tokens_outside_the_draft_vocabulary_are_counted_and_never_match(eagle: Any) -> None:
    texts = eagle.conversations(2, [[(3, 30)]], [30])
    ids = texts[0].token_ids
    found = HeldOut(texts, NoisyFeatures(24), (0, 1, 2)).replay(eagle.head(draft_size=10), torch.arange(10), 2)
    assert found.written == 27
    assert found.outside_vocabulary == int((ids[3:] >= 10).sum())
    assert sum(found.accepted) <= int((ids[3:] < 10).sum())


def test_only_greedy_texts_are_replayed(eagle: Any) -> None:
    texts = eagle.conversations(2, [[(3, 30)], [(3, 30)]], [30, 30])
    sampled = replace(texts[1], temperature=0.8)
    assert HeldOut([texts[0], sampled], NoisyFeatures(24), (0, 1, 2)).num_conversations == 1
    with pytest.raises(ValueError, match="none of the 1 held-out conversations is greedy"):
        HeldOut([sampled], NoisyFeatures(24), (0, 1, 2))
