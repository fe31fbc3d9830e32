"""The cost model: what a way to draft should give on this machine, and with which sizes.

A round of speculative decoding takes one draft and one forward of the target over the draft's rows and one more; it
gives τ tokens, the target's own included. So with measured times (deploy/runtime/costs.py) and known acceptance

    tokens per second = τ / (draft(levels, width) + T(1 + nodes))

is compared with 1 / T(1), plain decoding. (arXiv 2211.17192, section 3.3, with measured costs for its constants.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploy.runtime.costs import Costs
from deploy.runtime.speculation import Speculation

MOST_LEVELS = 6
_LOOKUP_TOKENS = {2: 1.3, 3: 1.7, 4: 2.3}
"""Tokens a round by length of the match, where nothing was measured: prompts differ too much for one truth."""


@dataclass(frozen=True)
class Expectation:
    """A mode's rounds on average: tokens that one gives, nodes and levels of its draft.

    levels, width: 0 and 1 where no model drafts. draft_ms: of a round on the machine where it was measured; None: not
    known, or to be computed from `levels` and `width`.
    """

    tokens: float
    nodes: float
    levels: float = 0.0
    width: float = 1.0
    draft_ms: float | None = None

    @classmethod
    def of(cls, counts: Speculation, *, width: float = 1.0, has_model: bool = True) -> Expectation:
        """What was counted."""
        rounds = max(counts.rounds, 1)
        return cls(
            tokens=counts.tau,
            nodes=counts.drafted / rounds,
            levels=counts.levels / rounds if has_model else 0.0,
            width=width,
            draft_ms=1e3 * counts.draft_seconds / rounds,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Expectation:
        """As plan.json holds it. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            tokens=float(raw["tau"]),
            nodes=float(raw["nodes_per_round"]),
            levels=float(raw["levels_per_round"]),
            width=float(raw["width"]),
            draft_ms=None if raw.get("draft_ms") is None else float(raw["draft_ms"]),
        )


def round_ms(costs: Costs, drafting_model: str | None, expected: Expectation) -> float:
    """Milliseconds of a round. drafting_model: whose levels these are; None: of no single model."""
    verify_ms = costs.forward_ms("target", 1 + expected.nodes)
    if drafting_model is not None and drafting_model in costs.drafts and expected.levels > 0:
        return verify_ms + costs.drafts[drafting_model].milliseconds(expected.levels, expected.width)
    return verify_ms + (expected.draft_ms or 0.0)


def tokens_per_second(costs: Costs, drafting_model: str | None, expected: Expectation) -> float:
    """What the cost model predicts."""
    return 1e3 * expected.tokens / round_ms(costs, drafting_model, expected)


def chain_expectation(survival: Sequence[float], levels: int) -> Expectation:
    """Of a chain. survival[j]: share of rounds in which the first j + 1 drafts are accepted; beyond what is known the
    last known ratio goes on."""
    known = list(survival)
    while len(known) < levels:
        ratio = known[-1] / known[-2] if len(known) > 1 and known[-2] > 0 else (known[-1] if known else 0.0)
        known.append(known[-1] * min(ratio, 1.0) if known else 0.0)
    return Expectation(1 + sum(known[:levels]), levels, levels)


def best_chain(costs: Costs, drafting_model: str, survival: Sequence[float]) -> Expectation:
    """The chain of 1 … MOST_LEVELS levels that gives most tokens per second."""
    choices = [chain_expectation(survival, levels) for levels in range(1, MOST_LEVELS + 1)]
    return max(choices, key=lambda expected: tokens_per_second(costs, drafting_model, expected))


def worth_of_row(costs: Costs, drafting_model: str, expected: Expectation) -> float:
    """The least probability of acceptance with which a drafted token pays for its row of the target's forward: what
    the same time gives anyway, at the rate that `expected` reaches."""
    rows = expected.nodes + 1
    row_ms = max(costs.forward_ms("target", rows + 1) - costs.forward_ms("target", rows), 0.0)
    return row_ms * expected.tokens / round_ms(costs, drafting_model, expected)


def lookup_expectation(measured: Expectation | None, length: int, num_tokens: int) -> Expectation:
    """Of rounds whose text's last `length` tokens occurred before."""
    tokens = _LOOKUP_TOKENS.get(length, 2.0)
    if measured is not None:  # over all rounds, most of which find nothing: a lower bound
        tokens = max(tokens, measured.tokens)
    return replace(Expectation(tokens, num_tokens), draft_ms=0.02)
