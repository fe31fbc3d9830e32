"""The whole forward pass of a bundle's target: time by rows and context, prefill, decoding, loading, memory.

    python -m benchmarks.forward BUNDLE [--rows 1,2,4,…] [--contexts 128,2048] [--json OUT]

Times are milliseconds of one call that chooses tokens natively, Python around it included.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import fingerprint, resident_mb, time_ms, write_json
from deploy.formats.model_dir import ModelDirectory
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams

_GREEDY = SamplingParams()
_PREFILL_ROWS = 512


def chain(tokens: list[int], start: int, sequence: int = 0) -> list[Row]:
    return [Row(token, start + i, sequence, i - 1) for i, token in enumerate(tokens)]


def random_tokens(backend: CpuBackend, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, backend.shape.vocab_size, count)]


def fill(backend: CpuBackend, length: int, sequence: int = 0) -> None:
    """Bring a sequence's cache to `length` tokens."""
    backend.reset(sequence)
    tokens = random_tokens(backend, length)
    for begin in range(0, length, _PREFILL_ROWS):
        part = tokens[begin : begin + _PREFILL_ROWS]
        backend.forward(chain(part, begin, sequence), logit_rows=[])
        backend.keep(sequence, range(len(part)))


def time_rows(backend: CpuBackend, rows: list[int], context: int, repeats: int) -> dict[str, Any]:
    """rows → time of a call that continues `context` tokens by a chain of that many."""
    fill(backend, context)
    timed = {}
    for count in rows:
        call = partial(backend.forward_tokens, chain(list(range(100, 100 + count)), context), _GREEDY)
        timed[str(count)] = time_ms(call, repeats)
    return timed


def time_phases(backend: CpuBackend, count: int, context: int, repeats: int) -> dict[str, Any]:
    """Where the time of a call of `count` rows goes: milliseconds by phase, and how fast weights are read.

    One call's: the one at the first quartile of their sums, so that a disturbed call does not show.
    """
    fill(backend, context)
    rows = chain(list(range(100, 100 + count)), context)
    calls = []
    for _ in range(repeats):
        begin, spent = time.perf_counter(), dict[str, float]()
        with backend.phase_times(spent):
            backend.forward_tokens(rows, _GREEDY)
        whole = time.perf_counter() - begin
        calls.append(spent | {"python": whole - sum(spent.values())})
    best = sorted(calls, key=lambda spent: sum(spent.values()))[repeats // 4]
    linear = sum(best[name] for name in ("qkv", "output", "mlp", "head"))
    return {
        "ms": {name: 1e3 * value for name, value in best.items()},
        "linear_gb_s": backend.weight_bytes / linear / 1e9,
    }


def show_phases(count: int, context: int, found: dict[str, Any], read: float) -> None:
    parts = ", ".join(f"{name} {value:.3f}" for name, value in found["ms"].items())
    speed = found["linear_gb_s"]
    print(f"{count} rows at {context}, ms: {parts}")
    print(
        f"  linear layers read their weights at {speed:.1f} GB/s, {speed * 1e9 / read:.0%} of what mere reading reaches"
    )


def time_prefill(backend: CpuBackend, count: int, repeats: int) -> dict[str, float]:
    backend.reset(0)
    rows = chain(random_tokens(backend, count), 0)
    timed = time_ms(lambda: backend.forward_tokens(rows, _GREEDY, token_rows=[count - 1]), repeats, warmup=1)
    return timed | {"tok_s": count / timed["median"] * 1e3}


def decode(backend: CpuBackend, sequences: int, steps: int, context: int) -> float:
    """Tokens per second of greedy decoding, `sequences` together."""
    for sequence in range(sequences):
        fill(backend, context, sequence)
    tokens = list(range(100, 100 + sequences))
    begin = time.perf_counter()
    for step in range(steps):
        rows = [Row(token, context + step, sequence) for sequence, token in enumerate(tokens)]
        tokens = backend.forward_tokens(rows, _GREEDY).tokens
        for sequence in range(sequences):
            backend.keep(sequence, [sequence])
    return sequences * steps / (time.perf_counter() - begin)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle, or a model directory")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 6, 8, 12, 16, 32, 64])
    parser.add_argument("--contexts", type=numbers, default=[128, 2048])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128, help="tokens to decode")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show_rows(context: int, timed: dict[str, Any]) -> None:
    print(f"context {context}")
    base = timed.get("1", {}).get("median")
    for rows, found in timed.items():
        ratio = f"   {found['median'] / base:.2f}× one row" if base else ""
        print(f"  {rows:>3} rows {found['median']:8.3f} ms   min {found['min']:8.3f}{ratio}")


def main() -> None:
    arguments = parse()
    path = arguments.bundle / "target" if (arguments.bundle / "target").is_dir() else arguments.bundle
    before = resident_mb()
    begin = time.perf_counter()
    backend = CpuBackend(ModelDirectory.open(path), threads=arguments.threads)
    load_ms = (time.perf_counter() - begin) * 1e3
    result: dict[str, Any] = {
        "machine": fingerprint(backend.runtime),
        "bundle": arguments.bundle.name,
        "load_ms": load_ms,
        "weight_mb": backend.weight_bytes / 1e6,
        "resident_mb": {"before_loading": before, "loaded": resident_mb()},
        "rows_ms": {},
    }
    print(f"loaded in {load_ms:.0f} ms; packed weights {result['weight_mb']:.1f} MB")
    contexts = [n for n in arguments.contexts if n + max(arguments.rows) <= backend.shape.context_length]
    for context in contexts:
        result["rows_ms"][str(context)] = time_rows(backend, arguments.rows, context, arguments.repeats)
        show_rows(context, result["rows_ms"][str(context)])
    result["resident_mb"]["longest_context"] = resident_mb()
    read = max(backend.runtime.read_bandwidth(192 << 20, 4) for _ in range(4))
    result["read_gb_s"], result["phases"] = read / 1e9, {}
    for count, context in [(1, n) for n in contexts] + [(6, n) for n in contexts[:1]]:
        found = time_phases(backend, count, context, arguments.repeats)
        result["phases"][f"{count} rows at {context}"] = found
        show_phases(count, context, found, read)
    prefill = result["prefill"] = time_prefill(backend, arguments.prefill, max(3, arguments.repeats // 6))
    print(f"prefill of {arguments.prefill}: {prefill['median']:.1f} ms, {prefill['tok_s']:.0f} tok/s")
    context = contexts[0] if contexts else 8
    for sequences in (1, 16):
        result[f"decode_{sequences}_tok_s"] = rate = decode(backend, sequences, arguments.steps, context)
        print(f"decoding, {sequences} together: {rate:.0f} tok/s")
    print(f"resident memory: {result['resident_mb']}")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
