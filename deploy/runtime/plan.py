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
LOOKUP_SURVIVAL: Mapping[int, tuple[float, ...]] = {
    2: (0.56, 0.36, 0.28, 0.23, 0.19, 0.16, 0.14, 0.12, 0.10, 0.09, 0.08, 0.08, 0.07, 0.06, 0.06),
    3: (0.65, 0.50, 0.40, 0.33, 0.29, 0.25, 0.22, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
    4: (0.80, 0.67, 0.57, 0.50, 0.43, 0.38, 0.33, 0.30, 0.28, 0.26, 0.24, 0.23, 0.21, 0.20, 0.19),
    8: (0.89, 0.79, 0.71, 0.66, 0.61, 0.58, 0.54, 0.51, 0.48, 0.46, 0.44, 0.42, 0.40, 0.38, 0.36),
    16: (0.99, 0.97, 0.96, 0.95, 0.94, 0.93, 0.93, 0.92, 0.91, 0.90, 0.90, 0.89, 0.89, 0.88, 0.88),
}
"""Length of a match → share of them whose first j + 1 copied tokens are all right: what a session starts from, for
prompts differ too much for one truth. Of 300 greedy conversations of SmolLM2-135M-Instruct in 4 bits, loops included
(`python -m benchmarks.lookup`, on experiment=smollm2_full generate.stop_loops=false)."""
_LOOKUP_MS = 0.02


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
    return row_ms(costs, expected) * expected.tokens / round_ms(costs, drafting_model, expected)


def row_ms(costs: Costs, expected: Expectation) -> float:
    """What one more row adds to the target's forward."""
    rows = expected.nodes + 1
    return max(costs.forward_ms("target", rows + 1) - costs.forward_ms("target", rows), 0.0)


def best_lookups(costs: Costs) -> dict[int, Expectation]:
    """Length of a match → the number of tokens that gives most of them per second, by LOOKUP_SURVIVAL."""
    found = {}
    for length, survival in LOOKUP_SURVIVAL.items():
        choices = [
            replace(chain_expectation(survival, count), levels=0.0, draft_ms=_LOOKUP_MS)
            for count in range(1, len(survival) + 1)
        ]
        found[length] = max(choices, key=lambda expected: tokens_per_second(costs, None, expected))
    return found
