"""Calibration text that the target writes itself.

Self-calibration (arXiv 2410.17170) and LLM-QAT (arXiv 2305.17888): the model continues a short prefix by sampling, so
that calibration data follow the distribution that the model was trained on, and no corpus is needed. For an
instruction model the prefix is its chat template's user header, after which it writes a realistic user turn (Magpie,
arXiv 2406.08464), and then its own answer. The most perplexing fifth of the samples is dropped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""
CANDIDATES = 1024
"""Sampling looks at this many of the most likely tokens; the nucleus of a sane model is far smaller."""


@dataclass(frozen=True)
class SamplingRule:
    """How tokens are drawn, and which of them end a text."""

    temperature: float
    top_p: float
    end_ids: frozenset[int]


@dataclass
class Continuation:
    """Sampled tokens and the log-probability of each under the model's own, untruncated distribution."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_finished: bool = False


@torch.inference_mode()
def sample_continuations(
    model: PreTrainedModel,
    prompts: list[list[int]],
    rule: SamplingRule,
    *,
    num_tokens: int,
    generator: torch.Generator,
    on_step: Callable[[int], None],
) -> list[Continuation]:
    """Continues every prompt in one batch by up to `num_tokens` sampled tokens, or to one of the rule's end ids (kept).

    on_step is called after each step with the number of rows written.
    """
    results = [Continuation() for _ in prompts]
    rows = list(range(len(prompts)))
    ids, mask = _left_padded(prompts)
    cache, step_ids = None, ids
    for _ in range(num_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        out = model(
            step_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        chosen = _sample(logits, rule, generator)
        log_probs = torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
        for row, token, log_prob in zip(rows, chosen.tolist(), log_probs.tolist(), strict=True):
            if not results[row].is_finished:
                results[row].tokens.append(token)
                results[row].log_probs.append(log_prob)
                results[row].is_finished = token in rule.end_ids
        on_step(sum(not results[row].is_finished for row in rows))
        step_ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        alive = [i for i, row in enumerate(rows) if not results[row].is_finished]
        if not alive:
            break
        if len(alive) < COMPACT_BELOW * len(rows):
            keep = torch.tensor(alive)
            cache.batch_select_indices(keep)
            step_ids, mask, rows = step_ids[keep], mask[keep], [rows[i] for i in alive]
    return results


def drop_most_perplexing(continuations: list[list[Continuation]], *, share: float, min_kept: int) -> list[int]:
    """Indices, in order, of the samples that remain when the given share with the highest perplexity is dropped.

    Fewer are dropped where fewer than `min_kept` would remain.

    continuations: the sampled parts of each sample; a sample's perplexity is taken over all its sampled tokens.
    """
    mean_nll = []
    for parts in continuations:
        log_probs = [value for part in parts for value in part.log_probs]
        mean_nll.append(-sum(log_probs) / max(len(log_probs), 1))
    num_kept = max(len(mean_nll) - math.floor(share * len(mean_nll)), min_kept)
    by_perplexity = sorted(range(len(mean_nll)), key=lambda index: (mean_nll[index], index))
    return sorted(by_perplexity[:num_kept])


def _left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _sample(logits: Tensor, rule: SamplingRule, generator: torch.Generator) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751) over logits [rows, vocabulary]; returns the ids [rows]."""
    values, ids = logits.topk(min(CANDIDATES, logits.shape[1]), dim=-1)
    probs = torch.softmax(values / rule.temperature, -1)
    probs[probs.cumsum(-1) - probs >= rule.top_p] = 0
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def write_free_texts(
    model: PreTrainedModel,
    vocabulary: dict[str, int],
    rule: SamplingRule,
    *,
    num_samples: int,
    num_tokens: int,
    drop_share: float,
    seed: int,
    on_step: Callable[[int], None],
) -> list[list[int]]:
    """Token ids of `num_samples` texts, each begun with one random token that starts a word (LLM-QAT, section 3.1).

    vocabulary: token text → id. on_step: called with 1 after each step of the whole batch.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    starts = sorted(i for token, i in vocabulary.items() if token.isascii() and token.isalpha() and token[0].isupper())
    num_begun = math.ceil(num_samples / (1 - drop_share))
    picks = torch.randint(len(starts), (num_begun,), generator=generator).tolist()
    prompts = [[starts[pick]] for pick in picks]
    texts = sample_continuations(
        model,
        prompts,
        rule,
        num_tokens=num_tokens,
        generator=generator,
        on_step=lambda _num_rows: on_step(1),
    )
    kept = drop_most_perplexing([[text] for text in texts], share=drop_share, min_kept=num_samples)
    return [prompts[index] + texts[index].tokens for index in kept][:num_samples]


def sampling_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it natively (sampling then takes a third of the time), else float32."""
    is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_native else torch.float32
