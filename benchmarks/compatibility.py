"""How quantization and speculation go together: one row for each finished bundle, of the same target.

    python -m benchmarks.compatibility BUNDLE… [--repeats N] [--threads N] [--json OUT]

Quality, τ and speed-up are the bundles' own records: perplexity and KL from `quality`, τ of the EAGLE head as served,
tokens per second of modes eagle and plain from `evaluate` (plan.json). Times are taken here, the bundles in turn so
that a noisy moment meets them all: T(n), a call of n rows behind 128 tokens, and a prefill of 512. The source has no
times: the runtime would quantize it. Bundles are made by `python -m pipeline experiment=compatibility …`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.forward import chain, fill, random_tokens
from benchmarks.machine import fingerprint, write_json
from deploy.formats.bundle import Bundle
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.modes import Mode
from deploy.runtime.plan_file import read_plan_file
from deploy.runtime.sampling import SamplingParams

ROWS = (1, 6, 16, 64)
CONTEXT, PREFILL = 128, 512
OWN = " (this bundle)"
GREEDY = SamplingParams()


def recorded(bundle: Bundle) -> dict[str, Any]:
    """What the bundle says of itself. Raises ValueError when it has no quality table."""
    manifest = bundle.manifest
    own = next((row for row in manifest.quality if str(row["method"]).endswith(OWN)), None)
    if own is None:
        raise ValueError(f"{bundle.path}: its manifest has no quality of its own method; export it again")
    components, plan = {item.role: item for item in manifest.components}, read_plan_file(bundle)
    head = components.get("eagle-target")
    found: dict[str, Any] = {
        "name": manifest.name,
        "method": str(own["method"]).removesuffix(OWN),
        "bits_per_weight": own["bits_per_weight"],
        "mb": components["target"].num_bytes / 1e6,
        **quality(own),
    }
    if head is not None and head.drafter is not None:
        found["tau"] = head.drafter.acceptance.tau
    if plan is not None and "eagle" in plan.modes:
        modes: tuple[Mode, Mode] = ("eagle", "plain")
        rates = [plan.modes[mode]["decode_tok_s"] for mode in modes]
        found["eagle_speed_up"] = rates[0] / rates[1]
    return found


def quality(row: Any) -> dict[str, Any]:
    """{"perplexity": {group: …}, "kl": {group: …}} of a row of the manifest's table."""
    return {
        metric: {key.partition("/")[0]: value for key, value in row.items() if key.endswith(f"/{metric}")}
        for metric in ("perplexity", "kl")
    }


def times(backends: Sequence[CpuBackend], repeats: int) -> list[dict[str, float]]:
    """Median milliseconds of each backend's calls: one row, several rows, a prefill."""
    found: list[dict[str, float]] = [{} for _ in backends]
    for backend in backends:
        fill(backend, CONTEXT)
    for count in ROWS:
        rows = chain(list(range(100, 100 + count)), CONTEXT)
        calls = [partial(backend.forward_tokens, rows, GREEDY) for backend in backends]
        for each, median in zip(found, in_turn(calls, repeats), strict=True):
            each[f"T({count})"] = median
    prompts = [chain(random_tokens(backend, PREFILL), 0) for backend in backends]
    for backend in backends:
        backend.reset(0)
    calls = [
        partial(backend.forward_tokens, rows, GREEDY, token_rows=[PREFILL - 1])
        for backend, rows in zip(backends, prompts, strict=True)
    ]
    for each, median in zip(found, in_turn(calls, max(repeats // 4, 3)), strict=True):
        each[f"prefill({PREFILL})"] = median
    return found


def in_turn(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each call; all are made once before any is made again."""
    spent: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, mine in zip(calls, spent, strict=True):
            begin = time.perf_counter()
            call()
            if repeat:  # the first one warms up
                mine.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(mine) for mine in spent]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; ratios T(n)/T(1) stand behind the times."""
    groups = list(rows[0]["perplexity"])
    heading = ["bundle", "bits", "MB", *(f"{g} ppl" for g in groups), *(f"{g} KL" for g in groups)]
    heading += [f"T({n}) ms" for n in ROWS] + [f"prefill({PREFILL}) ms"]
    heading += [f"T({n})/T(1)" for n in ROWS[1:]] + ["τ", "EAGLE speed-up"]
    lines = [heading, ["---", *("---:" for _ in heading[1:])]]
    for row in rows:
        cells = [row["name"], f"{row['bits_per_weight']:.2f}", f"{row['mb']:.1f}" if "mb" in row else "–"]
        cells += [f"{row['perplexity'][g]:.3f}" for g in groups] + [f"{row['kl'][g]:.4f}" for g in groups]
        timed = row.get("ms", {})
        cells += [f"{timed[f'T({n})']:.2f}" if timed else "–" for n in ROWS]
        cells += [f"{timed[f'prefill({PREFILL})']:.1f}" if timed else "–"]
        cells += [f"{timed[f'T({n})'] / timed['T(1)']:.2f}" if timed else "–" for n in ROWS[1:]]
        cells += [f"{row[key]:.2f}" if key in row else "–" for key in ("tau", "eagle_speed_up")]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundles = [Bundle.open(path) for path in arguments.bundles]
    rows = [recorded(bundle) for bundle in bundles]
    backends = [CpuBackend(bundle.model(), threads=arguments.threads) for bundle in bundles]
    for row, timed in zip(rows, times(backends, arguments.repeats), strict=True):
        row["ms"] = timed
    first = bundles[0].manifest.quality[0]
    source = {"name": "source", "bits_per_weight": first["bits_per_weight"], **quality(first)}
    result = {"machine": fingerprint(backends[0].runtime), "context": CONTEXT, "rows": [source, *rows]}
    print(table([source, *rows]))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
