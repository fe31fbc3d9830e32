"""Native drafts of a bundle's EAGLE head, or of a random one over its target: time by depth and width.

    python -m benchmarks.draft BUNDLE [--draft-vocabulary 8192] [--depths 1,2,4,8] [--widths 1,4,8] [--json OUT]

Milliseconds of one draft behind `--context` tokens, Python around it included: right after another draft, whose weights
are still in the cache, and after a forward of the target, which has taken their place, as in decoding. A step is what
one more level costs; trees stop where a level adds nothing, so deep levels of wide ones may cost less. The roofline is
the time in which all threads together merely read a step's weights, from a buffer of their size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import fingerprint, write_json
from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord
from deploy.formats.speculators import EagleDirectory, tensor_contract, write_eagle
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.cpu_eagle import CpuEagle
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits

_BYTES_PER_WEIGHT = 0.5 + 4 / 32  # 4 bits, and a scale and a minimum in fp16 for every 32


def random_head(path: Path, target: ModelShape, draft_vocabulary: int, num_features: int) -> EagleDirectory:
    """A head that drafts nonsense as fast as a trained one drafts."""
    rng = np.random.default_rng(0)
    layers = tuple(np.linspace(1, target.num_layers, num_features).astype(int).tolist())
    config = EagleConfig.for_target(
        target,
        draft_vocab_size=draft_vocabulary,
        feature_layers=layers,
        norm_before_residual=True,
        num_drafted=4,
        embedding="reference",
    )
    sizes = {name: size for name, (dtype, size) in tensor_contract(config).items() if dtype == "BF16"}
    weights = {
        name: (np.ones(size) if len(size) == 1 else 0.02 * rng.standard_normal(size)).astype(np.float32)
        for name, size in sizes.items()
    }
    ids = np.sort(rng.choice(target.vocab_size, draft_vocabulary, replace=False)).astype(np.int64)
    none = Acceptance((0.0,) * 4, 1.0)
    record = TrainingRecord(
        tokens=0, seconds=0.0, served=none, served_form="", plain=none, cost_ratio=0.0, mbsu=0.0, settings={}, data={}
    )
    write_eagle(path, config, weights, ids, Owner("0" * 64, {}, "0" * 64, "0" * 64), record)
    return EagleDirectory.open(path, target)


class Drafting:
    """A head behind `context` tokens of which the last is drafted from again and again."""

    def __init__(self, target: CpuBackend, head: CpuEagle, context: int, sampling: SamplingParams) -> None:
        self._target, self._head, self._sampling, self._context = target, head, sampling, context
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, target.shape.vocab_size, context).tolist()
        width = len(head.feature_layers) * target.shape.hidden_size
        self._features = rng.standard_normal((context, width)).astype(np.float32)
        self._row = Row(self._tokens[0], 0)
        head.draft(0, self._tokens[:-1], self._features[:-1], TreeLimits(1), sampling)

    def once(self, limits: TreeLimits) -> float:
        """Milliseconds of one draft."""
        begin = time.perf_counter()
        self._head.draft(0, self._tokens[-1:], self._features[-1:], limits, self._sampling)
        spent = time.perf_counter() - begin
        self._head.truncate(0, self._context - 1)
        return 1e3 * spent

    def median(self, limits: TreeLimits, repeats: int, *, is_cold: bool) -> float:
        """Milliseconds; is_cold: after a forward of the target."""
        times = []
        for _ in range(repeats + 3):
            if is_cold:
                self._target.forward([self._row], logit_rows=[0])
            times.append(self.once(limits))
        return statistics.median(times[3:])


def step_bytes(head: EagleDirectory) -> float:
    """Packed weights that one level reads: everything but what turns features into a state."""
    sizes = [size for name, (_, size) in head.contract.items() if name != "fc.weight" and not name.startswith("embed")]
    return sum(_BYTES_PER_WEIGHT * size[0] * size[1] for size in sizes if len(size) == 2)


def measure(target: CpuBackend, directory: EagleDirectory, arguments: argparse.Namespace) -> dict[str, Any]:
    head = CpuEagle(directory, target)
    sampling = SamplingParams(temperature=arguments.temperature)
    drafting = Drafting(target, head, arguments.context, sampling)
    size = step_bytes(directory)
    roofline = 1e3 * size / target.runtime.read_bandwidth(int(size), 200)
    print(f"head of {head.weight_bytes / 1e6:.1f} MB; a step reads {size / 1e6:.1f} MB, at best in {roofline:.3f} ms")
    print("width  depth     warm   a step     cold   a step")
    rows: list[dict[str, Any]] = []
    for width in arguments.widths:
        before: dict[str, float] = {}
        for depth in arguments.depths:
            limits = TreeLimits(depth, width, min(64, depth * width))
            found = {
                name: drafting.median(limits, arguments.repeats, is_cold=name == "cold") for name in ("warm", "cold")
            }
            steps = {name: (found[name] - before.get(name, 0)) / (depth - before.get("depth", 0)) for name in found}
            before = {**found, "depth": depth}
            rows.append({"width": width, "depth": depth, "ms": found, "ms_per_step": steps})
            warm, cold = (f"{found[name]:8.3f} {steps[name]:8.3f}" for name in ("warm", "cold"))
            print(f"{width:5} {depth:6} {warm} {cold}")
    return {"weight_bytes": head.weight_bytes, "step_bytes": size, "roofline_ms": roofline, "drafts": rows}


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft-vocabulary", type=int, help="measure a random head of that many tokens")
    parser.add_argument("--features", type=int, default=3, help="states that a random head reads")
    parser.add_argument("--depths", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--widths", type=numbers, default=[1, 4, 8])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    target = CpuBackend(arguments.bundle / "target", threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.draft_vocabulary is None:
            directory = EagleDirectory.open(arguments.bundle / "eagle-target", target.shape)
        else:
            directory = random_head(Path(folder), target.shape, arguments.draft_vocabulary, arguments.features)
        found = measure(target, directory, arguments)
    write_json(arguments.json, {"machine": fingerprint(target.runtime), "head": found})


if __name__ == "__main__":
    main()
