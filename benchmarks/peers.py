"""Our runtime and llama.cpp on the same source model, in one run, measurement by measurement in turn.

    python -m benchmarks.peers BUNDLE --gguf SOURCE.gguf --peer-python PYTHON [--threads 2] [--json OUT]

PYTHON is an interpreter with llama-cpp-python compiled on this machine. llama.cpp gets Q4_0, the format that it repacks
and runs fastest on x86, made here from the same source. The two sides take turns, so that a noisy neighbour meets both;
ratios are of medians. Perplexity of both sides is measured on the same held-out tokens of the bundle's own run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forward import chain, fill
from benchmarks.machine import fingerprint, write_json
from deploy.formats.bundle import Bundle
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams

GREEDY = SamplingParams()
WORKER = Path(__file__).with_name("llamacpp_worker.py")
ROUNDS = 5
"""Turns that each measurement is divided into."""


class Peer:
    """llama.cpp in its own process."""

    def __init__(self, python: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """The worker's answer. Raises RuntimeError when it has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the llama.cpp process ended during {do!r}; run {WORKER} by hand to see why")
        return json.loads(line)


class Ours:
    """Our backend with the worker's commands."""

    def __init__(self, backend: CpuBackend) -> None:
        self.backend = backend

    def _timed(self, rows: list[Row], token_rows: list[int] | None = None) -> float:
        begin = time.perf_counter()
        self.backend.forward_tokens(rows, GREEDY, token_rows=token_rows)
        return (time.perf_counter() - begin) * 1e3

    def rows(self, count: int, context: int, repeats: int) -> list[float]:
        rows = chain([100 + i for i in range(count)], context)
        return [self._timed(rows) for _ in range(repeats)]

    def decode(self, context: int, steps: int) -> float:
        token, begin = 100, time.perf_counter()
        for step in range(steps):
            token = self.backend.forward_tokens([Row(token, context + step)], GREEDY).tokens[0]
            self.backend.keep(0, [0])
        spent = time.perf_counter() - begin
        self.backend.truncate(0, context)
        return steps / spent

    def prefill(self, count: int, repeats: int) -> list[float]:
        self.backend.reset(0)
        rows = chain([100 + i % 1000 for i in range(count)], 0)
        return [self._timed(rows, [count - 1]) for _ in range(repeats)]

    def together(self, count: int, context: int, repeats: int) -> list[float]:
        for sequence in range(count):
            fill(self.backend, context, sequence)
        rows = [Row(100, context, sequence) for sequence in range(count)]
        times = [self._timed(rows) for _ in range(repeats)]
        for sequence in range(1, count):
            self.backend.reset(sequence)
        return times

    def perplexity(self, sequences: list[list[int]]) -> float:
        nll, count = 0.0, 0
        for ids in sequences:
            self.backend.reset(0)
            logits = self.backend.forward(chain(ids, 0)).logits[:-1].astype(np.float64)
            best = logits.max(axis=1)
            log_sum = np.log(np.exp(logits - best[:, None]).sum(axis=1)) + best
            nll += float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
            count += len(ids) - 1
        return math.exp(nll / count)


def summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times)}


def compare(ours: Ours, peer: Peer, do: str, repeats: int, **arguments: Any) -> dict[str, Any]:
    """Times of both sides, in turns; ratio: the peer's median over ours (above 1: we are faster)."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        part = max(1, repeats // ROUNDS)
        times["ours"] += getattr(ours, do)(repeats=part, **arguments)
        times["peer"] += peer.ask(do, repeats=part, **arguments)
    found = {side: summary(values) for side, values in times.items()}
    return {**found, "ratio": found["peer"]["median_ms"] / found["ours"]["median_ms"]}


def compare_decode(ours: Ours, peer: Peer, context: int, steps: int) -> dict[str, Any]:
    """Greedy tokens per second of both sides; medians over the turns. Ratio above 1: we are faster."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        rates["ours"].append(ours.decode(context=context, steps=steps))
        rates["peer"].append(peer.ask("decode", context=context, steps=steps))
    found = {side: statistics.median(values) for side, values in rates.items()}
    return {"ours_tok_s": found["ours"], "peer_tok_s": found["peer"], "ratio": found["ours"] / found["peer"]}


def heldout_tokens(bundle: Path, per_group: int) -> dict[str, list[list[int]]]:
    """group → token sequences that the pipeline held out, found beside the bundle's artifact."""
    store = bundle.resolve().parents[2]
    wanted = Bundle.open(bundle).manifest.provenance.get("stages", {}).get("calibrate", {}).get("content")
    for manifest in sorted((store / "calibrate").glob("*/manifest.json")):
        if json.loads(manifest.read_text(encoding="utf-8"))["content"] != wanted:
            continue
        groups: dict[str, list[list[int]]] = {}
        for line in (manifest.parent / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["split"] == "heldout" and len(groups.setdefault(record["group"], [])) < per_group:
                groups[record["group"]].append(record["ids"])
        return groups
    raise SystemExit(
        f"{store / 'calibrate'} does not hold the samples that {bundle} was made with; run the pipeline, or leave "
        "perplexity out with --decode-only"
    )


def measure(
    ours: Ours, peer: Peer, arguments: argparse.Namespace, heldout: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """heldout: group → token sequences, whose perplexity is measured."""
    result: dict[str, Any] = {"rows": {}, "decode": {}}
    for context in arguments.contexts:
        fill(ours.backend, context)
        peer.ask("fill", length=context)
        result["decode"][str(context)] = compare_decode(ours, peer, context, arguments.steps)
        counts = arguments.rows if context == arguments.contexts[0] else [1, 6, 16]
        result["rows"][str(context)] = {
            str(n): compare(ours, peer, "rows", arguments.repeats, count=n, context=context) for n in counts
        }
    if arguments.decode_only:
        return result
    result["prefill_512"] = compare(ours, peer, "prefill", 10, count=512)
    result["together_16"] = compare(ours, peer, "together", arguments.repeats, count=16, context=128)
    result["perplexity"] = {
        group: {"ours": ours.perplexity(sequences), "peer": peer.ask("perplexity", sequences=sequences)}
        for group, sequences in heldout.items()
    }
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{'':24}{'ours':>12}{'llama.cpp':>12}{'ratio':>8}")
    for context, found in result["decode"].items():
        name = f"decode at {context}, tok/s"
        print(f"{name:24}{found['ours_tok_s']:12.1f}{found['peer_tok_s']:12.1f}{found['ratio']:8.2f}")
    timed = {f"{n} rows at {c}, ms": v for c, by_rows in result["rows"].items() for n, v in by_rows.items()}
    if "prefill_512" in result:
        timed |= {"prefill 512, ms": result["prefill_512"], "16 sequences, ms": result["together_16"]}
    for name, found in timed.items():
        ours, peer = found["ours"]["median_ms"], found["peer"]["median_ms"]
        print(f"{name:24}{ours:12.2f}{peer:12.2f}{found['ratio']:8.2f}")
    for group, found in result.get("perplexity", {}).items():
        print(f"{'perplexity, ' + group:24}{found['ours']:12.3f}{found['peer']:12.3f}")


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, required=True, help="the bundle's source as a GGUF file")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 6, 8, 12, 16, 32, 64])
    parser.add_argument("--contexts", type=numbers, default=[128, 2048])
    parser.add_argument("--steps", type=int, default=64, help="tokens to decode in a turn")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=4, help="held-out sequences per group for perplexity")
    parser.add_argument("--decode-only", action="store_true", help="decoding and few rows: minutes on large models")
    parser.add_argument("--keep-peer-format", action="store_true", help="run the file as it is instead of as Q4_0")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    heldout = {} if arguments.decode_only else heldout_tokens(arguments.bundle, arguments.sequences)
    peer = Peer(arguments.peer_python)
    with tempfile.TemporaryDirectory() as scratch:
        model = str(arguments.gguf)
        if not arguments.keep_peer_format:
            model = str(Path(scratch) / "q4_0.gguf")
            peer.ask("quantize", source=str(arguments.gguf), out=model, threads=arguments.threads)
        longest = max(arguments.contexts) + max(arguments.steps, *arguments.rows) + 16 * 256
        system = peer.ask("open", model=model, threads=arguments.threads, context_length=longest)
        backend = CpuBackend(Bundle.open(arguments.bundle).model(), threads=arguments.threads)
        result = {
            "machine": fingerprint(backend.runtime),
            "bundle": arguments.bundle.name,
            "peer": {
                "name": "llama.cpp",
                "format": "as is" if arguments.keep_peer_format else "Q4_0",
                "system": system,
            },
            "threads": arguments.threads,
            **measure(Ours(backend), peer, arguments, heldout),
        }
    show(result)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
