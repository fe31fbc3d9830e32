"""The hierarchy 70B ← 8B ← EAGLE at stated acceptances: what T(rows) predicts, and what the runtime then reaches.

Weights are random, so drafts are synthetic: right as often as stated, and made by the real models, whose own are thrown
away. No figure here is that of a trained drafter. Speed-ups are over plain decoding on the same backend; beside them
those of "Speculative Decoding Meets Quantization" (arXiv 2505.22179), Llama-3-70B in 4 bits on one A100.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_models import random_head, random_model, shapes_of
from benchmarks.gpu_run import Run
from deploy.runtime.backend import Backend
from deploy.runtime.costs import REPEATS, Costs, measure_drafts, measure_rows
from deploy.runtime.drafters.base import Drafter
from deploy.runtime.drafters.cascade import Cascade
from deploy.runtime.drafters.model import EagleDrafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.plan import Expectation, tokens_per_second
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.synthetic import SyntheticDrafter, rates_survival
from deploy.runtime.tree import ROOT, Draft, TreeLimits
from deploy.runtime.verify import Job, verify

PAPER = {"eagle-tree": 2.12, "cascade": 2.78}
# Acceptance of each place, given those before. EAGLE-2's tree on Llama-3.3-70B: τ 3.67 (its successor's paper, arXiv
# 2503.01840, table 1). On 8B: τ 4.05 there, of which three levels are used. 8B for 70B: assumed; the paper gives none.
RATES = {"eagle-tree": (0.77,) * 6, "inner": (0.79,) * 3, "cascade": (0.85,) * 7}
TREES = {"eagle-tree": TreeLimits(6, 10, 59), "inner": TreeLimits(3, 10, 29)}
"""EAGLE-2's for the target, and the paper's for the intermediate; the root is one node of 60 and 30."""
MIN_DRAFT_LENGTH = 6
CONTEXT, NUM_TOKENS = 256, 192
TINY_TREES = {"eagle-tree": TreeLimits(2, 2, 3), "inner": TreeLimits(1, 2, 2)}
TINY_CONTEXT, TINY_TOKENS = 4, 4
_GREEDY = SamplingParams()
_WARM_TOKENS = 24


class SyntheticTree(SyntheticDrafter):
    """Filled up with wrong tokens to a tree of `num_nodes`, so that its verification costs what a tree's does."""

    def __init__(self, rates: Sequence[float], vocab_size: int, num_nodes: int, inner: Drafter) -> None:
        super().__init__(rates, vocab_size, inner=inner)
        self._size, self._num_nodes = vocab_size, num_nodes

    def propose(
        self, sequence: int, path: Sequence[int], budget: int, sampling: SamplingParams, sample_index: int
    ) -> Draft:
        chain = super().propose(sequence, path, budget, sampling, sample_index)
        fill = self._num_nodes - len(chain)
        wrong = tuple(
            (path[-1] + 3 + i) % self._size for i in range(fill)
        )  # the chain begins with one of the two before
        return Draft(chain.tokens + wrong, chain.parents + (ROOT,) * fill)


def successors(start: int, count: int, vocab_size: int) -> list[int]:
    """What these models write."""
    return [(start + i) % vocab_size for i in range(count)]


def decode(model: Backend, drafter: Drafter, text: Sequence[int], num_prompt: int, num_warm: int) -> dict[str, float]:
    """Greedy decoding behind the prompt: tokens per second and tokens a round, the first `num_warm` left out.

    Raises RuntimeError where the model writes anything but `text`.
    """
    path, computed, rounds, begin, num_begun = list(text[:num_prompt]), 0, 0, time.perf_counter(), num_prompt
    for each in (model, drafter):
        each.reset(0)
    while len(path) < len(text):
        pending, draft = path[computed:], Draft()
        if computed:
            draft = drafter.propose(0, path, len(text) - len(path), _GREEDY, 0)
        (found,) = verify(model, [Job(0, computed, pending, draft, _GREEDY, 0)], drafter.taps)
        drafter.commit(0, found.computed, found.features)
        path += found.tokens
        computed += len(found.computed)
        rounds += 1
        if len(path) - num_prompt <= num_warm:
            rounds, begin, num_begun = 0, time.perf_counter(), len(path)
    if path[: len(text)] != list(text):
        raise RuntimeError("the model wrote another text; its forward is wrong")
    num_tokens = len(path) - num_begun
    return {"tok_s": num_tokens / (time.perf_counter() - begin), "tau": num_tokens / max(rounds, 1)}


def stated(rates: Sequence[float]) -> float:
    """τ: the model's own token, and those accepted."""
    return 1 + sum(rates_survival(rates))


def expectations(costs: Costs, trees: dict[str, TreeLimits]) -> dict[str, tuple[str | None, Expectation]]:
    """Mode → whose levels its drafts are, and its rounds as stated."""
    tree, inner = trees["eagle-tree"], trees["inner"]
    rounds = math.ceil(MIN_DRAFT_LENGTH / stated(RATES["inner"][: inner.depth]))
    inner_ms = costs.forward_ms("intermediate", 1 + inner.num_nodes)
    inner_ms += costs.drafts["eagle-intermediate"].milliseconds(inner.depth, inner.width)
    rates = RATES["eagle-tree"][: tree.depth]
    return {
        "plain": (None, Expectation(1.0, 0)),
        "eagle-tree": ("eagle-target", Expectation(stated(rates), tree.num_nodes, tree.depth, tree.width)),
        "cascade": (
            None,
            Expectation(stated(RATES["cascade"]), len(RATES["cascade"]), draft_ms=rounds * inner_ms),
        ),
    }


def measure(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Mode → predicted and reached tokens per second, speed-ups, and the paper's."""
    trees = TINY_TREES if run.is_tiny else TREES
    context, count = (TINY_CONTEXT, TINY_TOKENS) if run.is_tiny else (CONTEXT, NUM_TOKENS)
    target, model = (random_model(run, shapes_of(run)[name]) for name in ("70B", "8B"))
    heads = {"eagle-target": random_head(run, target), "eagle-intermediate": random_head(run, model)}
    size, rows = target.shape.vocab_size, (1, 2, 4) if run.is_tiny else target.row_counts
    how: dict[str, int] = {"context": context, "repeats": 1 if run.is_tiny else REPEATS}
    costs = Costs(
        {name: measure_rows(each, rows, **how) for name, each in (("target", target), ("intermediate", model))},
        {name: measure_drafts(head, target, head.shape.hidden_size, **how) for name, head in heads.items()},
    )

    def tree(name: str, head: str) -> SyntheticTree:
        limits = trees[name]
        return SyntheticTree(RATES[name][: limits.depth], size, limits.num_nodes, EagleDrafter(heads[head], limits))

    inner = tree("inner", "eagle-intermediate")
    cascade = Cascade(model, inner, min_draft_length=MIN_DRAFT_LENGTH)
    drafters: dict[str, Drafter] = {
        "plain": NoDrafter(),
        "eagle-tree": tree("eagle-tree", "eagle-target"),
        "cascade": SyntheticDrafter(RATES["cascade"], size, inner=cascade),
    }
    text = successors(100, context + count, size)
    for drafter in (*drafters.values(), inner):
        if isinstance(drafter, SyntheticDrafter):
            drafter.tell([successors(100, context + count + 64, size)])
    modes: dict[str, Any] = {}
    for name, (role, expected) in expectations(costs, trees).items():
        reached = decode(target, drafters[name], text, context, min(_WARM_TOKENS, count // 2))
        modes[name] = {
            "stated_tau": expected.tokens,
            "tau": reached["tau"],
            "predicted_tok_s": tokens_per_second(costs, role, expected),
            "tok_s": reached["tok_s"],
        }
        for key in ("tok_s", "predicted_tok_s"):
            modes[name][f"{key}_over_plain"] = modes[name][key] / modes["plain"][key]
        show(name, modes[name])
    return {"rates": {k: list(v) for k, v in RATES.items()}, "costs": costs.to_json(), "modes": modes, "paper": PAPER}


def show(name: str, mode: dict[str, float]) -> None:
    paper = f", the paper's {PAPER[name]:.2f}×" if name in PAPER else ""
    print(
        f"{name:11}stated τ {mode['stated_tau']:.2f}, reached {mode['tau']:.2f}; tokens/s {mode['tok_s']:.1f} "
        f"({mode['tok_s_over_plain']:.2f}× plain), predicted {mode['predicted_tok_s']:.1f} "
        f"({mode['predicted_tok_s_over_plain']:.2f}×{paper})",
        flush=True,
    )
