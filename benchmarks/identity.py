"""Whether every way to decode gives plain decoding's tokens: all modes, many prompts, several samplings.

    python -m benchmarks.identity BUNDLE --prompts FILE.jsonl [--limit 208] [--tokens 256] [--modes …]
        [--samplings "greedy,temperature 0.7,temperature 1.0"] [--threads 2] [--json OUT]

Answers are made several at a time, so that drafts of several sequences share a forward with prompts being read; plain
answers one at a time. Stop strings are taken from the plain answers, so that they do occur. OUT is written after each
mode; what it has of the same bundle, prompts and tokens stays, and is not done again, so runs of one thread with other
samplings or modes can share it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.machine import fingerprint, write_json
from benchmarks.speculative import choose_modes
from deploy.formats.bundle import Bundle
from deploy.runtime.generation import Generation, GenerationOptions, Request
from deploy.runtime.measure import counts_of
from deploy.runtime.modes import DrafterFactory, Mode
from deploy.runtime.prompts import read_prompts
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session

SAMPLINGS = {
    "greedy": (SamplingParams(), SamplingParams(repetition_penalty=1.1)),
    "temperature 0.7": (SamplingParams(0.7, seed=1), SamplingParams(0.7, top_p=0.9, repetition_penalty=1.1, seed=3)),
    "temperature 1.0": (SamplingParams(1.0, seed=2), SamplingParams(1.0, top_k=50, min_p=0.05, seed=4)),
}
"""What prompts are answered with, in turn: as it is, and with penalty or truncation."""
IN_FLIGHT = 8
OF_ALL = ("bundle", "prompts", "tokens")
"""What all figures of a file have in common."""


def answer(session: Session, requests: list[Request], in_flight: int) -> list[Generation]:
    found = dict(session.generate_many(requests, num_sequences=in_flight))
    return [found[index] for index in range(len(requests))]


def with_stops(requests: list[Request], answers: list[Generation]) -> list[Request]:
    """Every third request ends at a piece of its own plain answer."""
    stopped = []
    for index, (request, plain) in enumerate(zip(requests, answers, strict=True)):
        middle = len(plain.text) // 2
        piece = plain.text[middle : middle + 4]
        stop = (piece,) if index % 3 == 0 and piece.strip() else ()
        stopped.append(replace(request, options=replace(request.options, stop=stop)))
    return stopped


def compare(
    session: Session, factory: DrafterFactory, modes: Sequence[Mode], requests: list[Request]
) -> Iterator[tuple[Mode, dict[str, Any]]]:
    """Mode by mode: answers equal to plain ones (tokens, text and reason), and tokens a forward behind the prompt's."""
    session.use(factory.make("plain"))
    expected = answer(session, requests, 1)
    requests = with_stops(requests, expected)
    stopped = [index for index, request in enumerate(requests) if request.options.stop]
    for index, found in zip(stopped, answer(session, [requests[i] for i in stopped], 1), strict=True):
        expected[index] = found
    for mode in modes:
        session.use(factory.make(mode))
        begin = time.perf_counter()
        answers = answer(session, requests, IN_FLIGHT)
        same = sum(
            (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            for a, b in zip(answers, expected, strict=True)
        )
        tau = counts_of([answers]).tau
        tokens = sum(len(a.token_ids) for a in answers)
        print(f"    {mode:16}{same}/{len(answers)} identical, {tokens} tokens, τ {tau:.2f}", flush=True)
        figures = {
            "same": same,
            "total": len(answers),
            "tokens": tokens,
            "tau": round(tau, 4),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        yield mode, figures


def done_before(path: Path | None, wanted: dict[str, Any]) -> dict[str, Any]:
    """Sampling → mode → what earlier runs over the same bundle, prompts and tokens found."""
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    is_same = all(found.get(key) == value for key, value in wanted.items())
    return dict(found.get("samplings", {})) if is_same else {}


def record(path: Path, result: dict[str, Any], sampling: str, mode: Mode, figures: dict[str, Any]) -> None:
    """Add one mode's figures to the file, beside those that another run may have added since this one began.

    result: bundle, prompts, tokens and machine. A file of other ones is replaced.
    """
    with FileLock(path.with_name(path.name + ".lock")):
        wanted = {key: result[key] for key in OF_ALL}
        samplings = done_before(path, wanted)
        samplings.setdefault(sampling, {})[mode] = figures
        write_json(path, {**wanted, "samplings": samplings, "machine": result["machine"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=208)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--modes", type=lambda text: text.split(","), help="default: all that the bundle can do")
    parser.add_argument("--samplings", type=lambda text: text.split(","), default=list(SAMPLINGS))
    parser.add_argument("--threads", type=int, help="default: the cores")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.samplings if name not in SAMPLINGS]:
        parser.error(f"--samplings {','.join(unknown)}: only {', '.join(SAMPLINGS)}")
    bundle = Bundle.open(arguments.bundle)
    modes = [mode for mode in choose_modes(parser, arguments.modes, bundle) if mode != "plain"]
    session = Session.open(bundle, threads=arguments.threads)
    factory = DrafterFactory(bundle, session.backend, "cpu", arguments.threads)
    records = read_prompts(arguments.prompts)[: arguments.limit]
    room = session.backend.shape.context_length - arguments.tokens
    prompts = [session.encode_chat([{"role": "user", "content": record.turns[0]}])[:room] for record in records]
    result: dict[str, Any] = {"bundle": arguments.bundle.name, "prompts": len(prompts), "tokens": arguments.tokens}
    result["machine"] = fingerprint(session.backend.runtime)  # type: ignore[attr-defined]
    differing = []
    for name in arguments.samplings:
        done = done_before(arguments.json, {key: result[key] for key in OF_ALL}).get(name, {})
        differing += [f"{name}, {mode}" for mode, figures in done.items() if figures["same"] != figures["total"]]
        missing = [mode for mode in modes if mode not in done]
        print(f"{name}: {', '.join(missing) or 'all done before'}", flush=True)
        if not missing:
            continue
        options = [GenerationOptions(arguments.tokens, sampling) for sampling in SAMPLINGS[name]]
        requests = [Request(prompt, options[index % len(options)]) for index, prompt in enumerate(prompts)]
        for mode, figures in compare(session, factory, missing, requests):
            if arguments.json:
                record(arguments.json, result, name, mode, {**figures, "threads": result["machine"]["threads"]})
            if figures["same"] != figures["total"]:
                differing.append(f"{name}, {mode}")
    if differing:
        raise SystemExit(f"some answers differ from plain decoding's, a bug: {'; '.join(differing)}")


if __name__ == "__main__":
    main()
