"""Calibration text that the target writes itself.

Self-calibration (arXiv 2410.17170) and LLM-QAT (arXiv 2305.17888): the model continues a short prefix by sampling, so
that calibration data follow the distribution that the model was trained on, and no corpus is needed. For an
instruction model the prefix is its chat template's user header, after which it writes a realistic user turn (Magpie,
arXiv 2406.08464), and then its own answer. The most perplexing fifth of the samples is dropped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


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


class Writer(Protocol):
    """The target, as it is asked to write."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        ...

    def continue_texts(
        self,
        prompts: Mapping[int, Sequence[int]],
        rule: SamplingRule,
        *,
        num_tokens: int,
        seed: int,
        will_go_on: bool = False,
    ) -> dict[int, Continuation]:
        """Continues each prompt by up to `num_tokens` sampled tokens, or to one of the rule's end ids (kept).

        prompts: number → token ids. Number, seed and position decide what noise a token is drawn with, so a text is
        the same whatever else is written. will_go_on: texts of these numbers will be continued once more.
        """
        ...


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


@dataclass(frozen=True)
class FreeTextBudget:
    """How many free texts to keep and how long they may be. drop_share: the most perplexing share that is dropped."""

    num_samples: int
    num_tokens: int
    drop_share: float

    @property
    def num_begun(self) -> int:
        return math.ceil(self.num_samples / (1 - self.drop_share))

    @property
    def most_tokens(self) -> int:
        """What is written at most, dropped texts included."""
        return self.num_begun * self.num_tokens


def write_free_texts(
    writer: Writer, vocabulary: Mapping[str, int], rule: SamplingRule, budget: FreeTextBudget, *, seed: int
) -> list[list[int]]:
    """Token ids of texts that begin with one random token each, which starts a word (LLM-QAT, section 3.1).

    vocabulary: token text → id. Raises ValueError when none of them starts a word.
    """
    starts = sorted(i for token, i in vocabulary.items() if token.isascii() and token.isalpha() and token[0].isupper())
    if not starts:
        raise ValueError("no token of the target's is a word with a capital letter; set calibrate.free.num_samples=0")
    picks = np.random.default_rng(seed).choice(starts, size=budget.num_begun)
    prompts = [[int(start)] for start in picks]
    texts = writer.continue_texts(dict(enumerate(prompts)), rule, num_tokens=budget.num_tokens, seed=seed)
    parts = [[texts[number]] for number in range(len(prompts))]
    kept = drop_most_perplexing(parts, share=budget.drop_share, min_kept=budget.num_samples)
    return [prompts[number] + texts[number].tokens for number in kept][: budget.num_samples]
