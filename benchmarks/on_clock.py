"""Modes on a clock that only known costs advance: what each gives by category, without a busy machine's noise.

    python -m benchmarks.on_clock BUNDLE --prompts FILE.jsonl [--costs COSTS.json] [--modes auto,lookup,eagle,…]
        [--categories writing,coding,…] [--per-category 5] [--tokens 128] [--temperature 0] [--json OUT]

Every answer is really made, by the bundle's models. But a forward takes what T(rows) of COSTS says and a draft what its
levels cost; Python between them takes nothing, and reading the prompt is left out, by whatever model and whenever: its
rows take nothing. Mode auto goes by this clock too, so that the same command prints the same numbers anywhere. COSTS: a
file as `python -m deploy tune` keeps it, a plan.json or another result with costs, of this machine or of another; by
default what was measured here. Modes that run a model of which they say nothing are left out, also of auto's choices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json
from benchmarks.speculative import MT_BENCH, choose_modes, choose_records
from deploy.formats.bundle import Bundle
from deploy.runtime.auto_mode import auto_drafter, machine_costs, read_plan
from deploy.runtime.costs import Costs
from deploy.runtime.drafters.base import Drafter, DraftModel
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.machine import describe_device
from deploy.runtime.measure import acceptance_json, after_prompts
from deploy.runtime.modes import NEEDS, DrafterFactory, Mode, available_modes
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from deploy.runtime.speculation import Speculation, draft_depth


class Clock:
    """Milliseconds that were charged; called, seconds."""

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def __call__(self) -> float:
        return self.milliseconds / 1e3

    def charge(self, model: object, method: str, price: Callable[..., float]) -> None:
        """From now on `model.method` takes price(result, arguments)."""
        inner = getattr(model, method)

        def charged(*arguments: Any, **named: Any) -> Any:
            result = inner(*arguments, **named)
            self.milliseconds += price(result, arguments)
            return result

        setattr(model, method, charged)


class Simulation:
    """A bundle whose models take what `costs` say."""

    def __init__(self, bundle: Bundle, costs: Costs | None, threads: int | None) -> None:
        self.session = Session.open(bundle, threads=threads)
        self.factory = DrafterFactory(bundle, self.session.backend, "cpu", threads)
        self.costs = costs or machine_costs(self.factory)
        self.clock = Clock()
        self._num_prompt = 0
        roles = {component.role for component in bundle.manifest.components}
        for role in roles & set(self.costs.rows_ms):
            model = self.session.backend if role == "target" else self.factory.language_model(role)
            self.clock.charge(model, "forward_tokens", self._forward_price(role))
        for role in roles & set(self.costs.drafts):
            drafting = self.factory.head(role) if role.startswith("eagle-") else self.factory.language_model(role)
            assert isinstance(drafting, DraftModel)
            self.clock.charge(drafting, "draft", self._draft_price(role, drafting))

    def _forward_price(self, role: str) -> Callable[..., float]:
        def price(_result: Any, arguments: Sequence[Any]) -> float:
            num_rows = sum(row.position >= self._num_prompt for row in arguments[0])
            return self.costs.forward_ms(role, num_rows) if num_rows else 0.0

        return price

    def _draft_price(self, role: str, model: DraftModel) -> Callable[..., float]:
        is_head = bool(model.feature_layers)  # its row t reads token t + 1

        def price(draft: Any, arguments: Sequence[Any]) -> float:
            if model.length(arguments[0]) + is_head <= self._num_prompt:
                return 0.0
            return self.costs.drafts[role].milliseconds(max(draft_depth(draft), 1), arguments[3].width)

        return price

    def knows(self, mode: Mode) -> bool:
        """Whether the costs have all that the mode runs. Auto runs what they have, but with a head needs its drafts."""
        if mode == "auto":
            return self.knows("eagle" if "eagle" in available_modes(self.factory.bundle) else "plain")
        forwards = {"target", "intermediate"} if mode in ("cascade", "cascade-lookup") else {"target"}
        drafts = set(NEEDS[mode]) - forwards
        return forwards <= self.costs.rows_ms.keys() and drafts <= self.costs.drafts.keys()

    @property
    def left_out(self) -> list[Mode]:
        """What the bundle can do and the costs do not know."""
        return [mode for mode in available_modes(self.factory.bundle) if not self.knows(mode)]

    def drafter(self, mode: Mode) -> Drafter:
        if mode == "auto":
            plan = {mode: found for mode, found in read_plan(self.factory.bundle).items() if self.knows(mode)}
            return auto_drafter(self.factory, self.costs, plan, clock=self.clock)
        return self.factory.make(mode)

    def answer(self, prompt: list[int], options: GenerationOptions) -> tuple[tuple[int, ...], float, Speculation]:
        """Tokens, milliseconds, and what the drafts came to, in all rounds but the prompt's."""
        begin, self._num_prompt = self.clock.milliseconds, len(prompt)
        found = self.session.generate(prompt, options)
        return found.token_ids, self.clock.milliseconds - begin, after_prompts(found.speculation, 1)


def read_stated(path: Path) -> tuple[Costs, Any]:
    """The costs that a file holds, and of which machine it says that they are."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Costs.from_json(raw.get("costs", raw)), raw.get("machine")


def measure(
    simulation: Simulation, modes: Sequence[Mode], records: Sequence[PromptRecord], options: argparse.Namespace
) -> dict[str, Any]:
    """Mode → speed-up over plain decoding, what the drafts came to, and the speed-up by category.

    A speed-up is None where no answer has a second token. Raises RuntimeError when a mode's answer is not the first
    one's.
    """
    found: dict[str, Any] = {}
    expected: list[tuple[int, ...]] = []
    for mode in modes:
        simulation.session.use(simulation.drafter(mode))
        by_category: dict[str, list[float]] = {}
        counts, texts = [], []
        for index, record in enumerate(records):
            prompt = simulation.session.encode_chat([{"role": "user", "content": record.turns[0]}])
            how = GenerationOptions(options.tokens, SamplingParams(options.temperature, seed=index))
            tokens, milliseconds, speculation = simulation.answer(prompt, how)
            sums = by_category.setdefault(record.category or "", [0.0, 0.0])
            sums[0] += len(tokens) - 1
            sums[1] += milliseconds
            counts.append(speculation)
            texts.append(tokens)
        expected = expected or texts
        if texts != expected:
            raise RuntimeError(f"{mode} and {modes[0]} give different answers")
        alone = simulation.costs.forward_ms("target", 1)
        total = Speculation.total(counts)
        given, taken = (sum(sums[i] for sums in by_category.values()) for i in (0, 1))
        found[mode] = {
            "speedup": speedup(alone, given, taken),
            **acceptance_json(total),
            "by_category": {name: speedup(alone, *sums) for name, sums in by_category.items()},
        }
        parts = "  ".join(f"{name} {shown(ratio, 2)}" for name, ratio in found[mode]["by_category"].items())
        print(f"{mode:15} {shown(found[mode]['speedup'], 3)}x plain, τ {total.tau:.3f}: {parts}", flush=True)
    return found


def speedup(alone: float, num_tokens: float, milliseconds: float) -> float | None:
    """Over one token every `alone` milliseconds; None where there is no token."""
    return round(alone * num_tokens / milliseconds, 3) if num_tokens else None


def shown(ratio: float | None, num_digits: int) -> str:
    return "–" if ratio is None else f"{ratio:.{num_digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--costs", type=Path)
    parser.add_argument("--modes", type=lambda text: text.split(","))
    parser.add_argument("--categories", type=lambda text: text.split(","), default=list(MT_BENCH))
    parser.add_argument("--per-category", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    named = choose_modes(parser, arguments.modes, bundle)
    try:
        costs, machine = read_stated(arguments.costs) if arguments.costs else (None, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"--costs {arguments.costs}: holds no costs ({error})")
    simulation = Simulation(bundle, costs, arguments.threads)
    chosen = choose_records(arguments)
    left_out = simulation.left_out
    modes = named if arguments.modes else ["plain", *(m for m in named if m not in ("plain", *left_out))]
    if unknown := [mode for mode in modes if mode in left_out]:
        parser.error(f"--modes {','.join(unknown)}: the costs say nothing of a model that they need")
    if left_out:
        print(f"without {', '.join(left_out)}, in auto too: the costs say nothing of a model that they need")
    found = measure(simulation, modes, chosen, arguments)
    if arguments.json:
        write_json(
            arguments.json,
            {
                "bundle": bundle.path.name,
                "prompts": len(chosen),
                "tokens": arguments.tokens,
                "temperature": arguments.temperature,
                "machine": machine or describe_device(simulation.session.backend),
                "costs": simulation.costs.to_json(),
                "left_out": left_out,
                "modes": found,
            },
        )


if __name__ == "__main__":
    main()
