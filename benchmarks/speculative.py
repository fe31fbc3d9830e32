"""Every way to decode, ours and llama.cpp's, on the same prompts and the same source model, prompt by prompt in turn.

    python -m benchmarks.speculative BUNDLE --prompts FILE.jsonl --gguf SOURCE.gguf --peer-python PYTHON
        [--peer-drafter SMALLER.gguf] [--sweep-prompts 4] [--categories writing,coding,…] [--per-category 5]
        [--tokens 128] [--json OUT]

llama.cpp gets Q4_0, made from the same source, and speculates at its best: n-grams and, where a smaller model is given,
a draft model (also Q4_0), each with the draft length and confidence that a sweep over some of the prompts finds
fastest. Its times count its own calls and the choice of tokens. Greedy; rates are tokens over time of all answers, and
what is told of rounds (tokens a forward, drafts) leaves the forward out that reads the prompt, on either side.
The category "random" is made here, not read from the file: prompts of random characters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import fingerprint, write_json
from benchmarks.peers import Peer
from benchmarks.random_prompts import CATEGORY, random_records
from deploy.formats.bundle import Bundle
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.drafters.base import Drafter
from deploy.runtime.generation import GenerationOptions
from deploy.runtime.measure import acceptance_json, after_prompts
from deploy.runtime.modes import DrafterFactory, Mode, available_modes, require_possible
from deploy.runtime.prompts import PromptRecord, read_prompts
from deploy.runtime.session import Session
from deploy.runtime.speculation import Speculation

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SWEEP_LENGTHS, SWEEP_CONFIDENCE = (1, 2, 3, 4, 6, 8), (0.0, 0.5, 0.75, 0.9)

Answer = dict[str, Any]
Way = Callable[[list[int]], Answer]


class Ours:
    """Our session, by mode. Answers: tokens, prefill_s, decode_s and what the drafts came to."""

    def __init__(self, bundle: Bundle, threads: int, tokens: int) -> None:
        self.session = Session.open(bundle, threads=threads)
        self.factory = DrafterFactory(bundle, self.session.backend, "cpu", threads)
        self._options, self._drafters = GenerationOptions(tokens), dict[Mode, Drafter]()

    def answer(self, mode: Mode, prompt: list[int]) -> Answer:
        if mode not in self._drafters:
            self._drafters[mode] = self.factory.make(mode)
        self.session.use(self._drafters[mode])
        found = self.session.generate(prompt, self._options)
        return {
            "tokens": list(found.token_ids),
            "prefill_s": found.prefill_seconds,
            "decode_s": found.decode_seconds,
            "speculation": found.speculation,
        }


def sweep(ask: Callable[..., Answer], name: str, prompts: Sequence[list[int]], grid: list[dict[str, Any]]) -> Any:
    """The settings of `grid` with which llama.cpp decodes fastest, and the rate of each."""
    rates = []
    for settings in grid:
        answers = [ask(name, prompt, **settings) for prompt in prompts]
        rates.append((decode_rate(answers), settings))
        print(f"  llama.cpp {name} {settings}: {rates[-1][0]:.1f} tok/s", flush=True)
    best = max(rates, key=lambda pair: pair[0])
    return best[1], [{**settings, "decode_tok_s": round(rate, 1)} for rate, settings in rates]


def decode_rate(answers: Sequence[Answer]) -> float:
    return sum(len(a["tokens"]) - 1 for a in answers) / sum(a["decode_s"] for a in answers)


def rates(answers: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    tokens = sum(len(a["tokens"]) for a in answers)
    seconds = sum(a["decode_s"] + a["prefill_s"] for a in answers)
    found: dict[str, Any] = {
        "decode_tok_s": round(decode_rate(answers), 1),
        "e2e_tok_s": round(tokens / seconds, 1),
        "speedup_median": round(
            statistics.median(
                (len(a["tokens"]) / (a["decode_s"] + a["prefill_s"]))
                / (len(p["tokens"]) / (p["decode_s"] + p["prefill_s"]))
                for a, p in zip(answers, plain, strict=True)
            ),
            3,
        ),
        "tokens": tokens,
        "identical_to_plain": sum(a["tokens"] == p["tokens"] for a, p in zip(answers, plain, strict=True)),
    }
    if "speculation" in answers[0]:
        counts = after_prompts(Speculation.total(a["speculation"] for a in answers), len(answers))
        decode_ms = 1e3 * sum(a["decode_s"] for a in answers)
        found |= {
            **acceptance_json(counts),
            "rounds": counts.rounds,
            "draft_ms": round(1e3 * counts.draft_seconds / max(counts.rounds, 1), 3),
            "other_share": round(1 - 1e3 * (counts.draft_seconds + counts.verify_seconds) / decode_ms, 4)
            if decode_ms
            else None,
        }
    elif "rounds" in answers[0]:
        counts = Speculation(rounds=sum(a["rounds"] for a in answers), emitted=tokens - len(answers))
        found |= {"tau": round(counts.tau, 4), "rounds": counts.rounds}
    return found


def choose_modes(parser: argparse.ArgumentParser, names: Sequence[str] | None, bundle: Bundle) -> list[Mode]:
    """The modes of these names; None: all that the bundle can do. Ends the program at one that it cannot."""
    try:
        return [require_possible(name, bundle) for name in (available_modes(bundle) if names is None else names)]
    except ValueError as error:
        parser.error(f"--modes: {error}")


def choose_records(arguments: argparse.Namespace) -> list[PromptRecord]:
    wanted, taken = arguments.categories, dict.fromkeys(arguments.categories, 0)
    chosen = []
    for record in read_prompts(arguments.prompts):
        if record.category in wanted and taken[record.category] < arguments.per_category:
            taken[record.category] += 1
            chosen.append(record)
    if CATEGORY in wanted:
        chosen += random_records(arguments.per_category)
    if not chosen:
        raise SystemExit(f"{arguments.prompts}: has no prompt of {', '.join(wanted)}")
    return chosen


def measure(
    arguments: argparse.Namespace, ours: Ours, peer: Peer | None, records: list[PromptRecord], modes: Sequence[Mode]
) -> Answer:
    """Way → its figures. modes: ours, "plain" among them, over which the others' figures are."""
    prompts = [ours.session.encode_chat([{"role": "user", "content": record.turns[0]}]) for record in records]
    ends = sorted(ours.session._eos)

    def ask(name: str, prompt: list[int], **settings: Any) -> Answer:
        assert peer is not None
        found: Answer = peer.ask(name, tokens=prompt, count=arguments.tokens, ends=ends, **settings)
        return found

    ways: dict[str, Way] = {mode: lambda p, mode=mode: ours.answer(mode, p) for mode in modes}  # type: ignore[misc]
    result: Answer = {"sweeps": {}}
    if peer is not None:
        ways["llama.cpp"] = lambda p: ask("answer", p)
        grids: dict[str, list[Answer]] = {"answer_by_ngrams": [{"num_drafted": n} for n in SWEEP_LENGTHS]}
        if arguments.peer_drafter:
            grids["answer_by_model"] = [
                {"num_drafted": n, "p_min": p} for n in SWEEP_LENGTHS for p in SWEEP_CONFIDENCE if n > 1 or p == 0
            ]
        for name, grid in grids.items():
            step = max(1, len(prompts) // arguments.sweep_prompts)
            best, tried = sweep(ask, name, prompts[::step][: arguments.sweep_prompts], grid)
            result["sweeps"][name] = {"best": best, "tried": tried}
            label = f"llama.cpp {name.removeprefix('answer_by_')}"
            ways[label] = lambda p, name=name, best=best: ask(name, p, **best)  # type: ignore[misc]
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    for index, prompt in enumerate(prompts):
        for name, way in ways.items():
            answers[name].append(way(prompt))
        print(f"  prompt {index + 1} of {len(prompts)}", end="\r", flush=True)
    for name, found in answers.items():
        plain = answers["llama.cpp" if name.startswith("llama.cpp") else "plain"]
        by_category = {}
        for category in dict.fromkeys(record.category for record in records):
            places = [i for i, record in enumerate(records) if record.category == category]
            by_category[category] = rates([found[i] for i in places], [plain[i] for i in places])
        result[name] = {**rates(found, plain), "by_category": by_category}
    return result


def show(result: Answer) -> None:
    print(f"{'':22}{'decode tok/s':>13}{'end to end':>12}{'× plain':>9}{'τ':>7}{'identical':>11}")
    plain = result["plain"]["decode_tok_s"]
    for name, found in result.items():
        if name == "sweeps":
            continue
        tau = f"{found['tau']:.2f}" if "tau" in found else ""
        ratio = f"{found['decode_tok_s'] / plain:.2f}" if plain else ""  # answers of one token have no rate
        print(
            f"{name:22}{found['decode_tok_s']:13.1f}{found['e2e_tok_s']:12.1f}{ratio:>9}"
            f"{tau:>7}{found['identical_to_plain']:>11}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="the bundle's source as a GGUF file; without it only we run")
    parser.add_argument("--peer-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--peer-drafter", type=Path, help="a smaller model of the same tokenizer, as a GGUF file")
    parser.add_argument("--sweep-prompts", type=int, default=4, help="on which llama.cpp's drafts are tuned")
    parser.add_argument("--modes", type=lambda text: text.split(","), help="ours beside plain; default: all")
    parser.add_argument("--categories", type=lambda text: text.split(","), default=list(MT_BENCH))
    parser.add_argument("--per-category", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle, records = Bundle.open(arguments.bundle), choose_records(arguments)
    modes: list[Mode] = ["plain", *(mode for mode in choose_modes(parser, arguments.modes, bundle) if mode != "plain")]
    ours = Ours(bundle, arguments.threads, arguments.tokens)
    assert isinstance(ours.session.backend, CpuBackend)
    with tempfile.TemporaryDirectory() as scratch:
        peer = open_peer(arguments, Path(scratch)) if arguments.gguf else None
        machine = fingerprint(ours.session.backend.runtime)
        result = measure(arguments, ours, peer, records, modes)
    print()
    show(result)
    about = {"machine": machine, "bundle": arguments.bundle.name, "prompts": len(records), "tokens": arguments.tokens}
    write_json(arguments.json, {**about, **result})


def open_peer(arguments: argparse.Namespace, scratch: Path) -> Peer:
    """llama.cpp with its models in Q4_0."""
    if not arguments.peer_python:
        raise SystemExit("--gguf needs --peer-python: llama.cpp runs in an environment of its own")
    peer = Peer(arguments.peer_python)
    for do, source in (("open", arguments.gguf), ("open_drafter", arguments.peer_drafter)):
        if source is None:
            continue
        out = str(scratch / f"{do}.gguf")
        peer.ask("quantize", source=str(source), out=out, threads=arguments.threads)
        peer.ask(do, model=out, threads=arguments.threads, context_length=4096)
    return peer


if __name__ == "__main__":
    main()
