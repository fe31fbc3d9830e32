"""Data generation as the pipeline does it: tokens that the target writes per second, everything included.

    python -m benchmarks.generation BUNDLE [--seconds 60] [--json OUT] [generate.num_turns=2 generate=prompts …]

The stage's own function runs on the bundle's target with conf/generate/ (and overrides of it) until the time is up.
Counted is every sampled token; the time around the native calls is what Python, prompts and files cost. The first call
is not timed: it maps the weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.machine import fingerprint, resident_mb, write_json
from deploy.runtime.backend import ForwardTokens
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.cli import config_directory
from pipeline.graph import BuildContext
from pipeline.schema import register
from pipeline.stages import generate
from pipeline.tracking import Trackers
from train.data.dialogue import RESPONSES

ENDLESS = 1 << 40


class TimeUpError(Exception):
    """The measurement ends."""


class Watch:
    """Stands in for `CpuBackend.forward_tokens`: counts its tokens, rows and seconds, and stops when time is up."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._forward = seconds, CpuBackend.forward_tokens
        self._start: float | None = None
        self.prompt_tokens = self.response_tokens = self.rows = self.calls = 0
        self.native_seconds = self.elapsed = 0.0

    def forward_tokens(self, backend: CpuBackend, *arguments: Any, **named: Any) -> ForwardTokens:
        begin = time.perf_counter()
        if self._start is not None and begin - self._start > self._seconds:
            self.elapsed = begin - self._start
            raise TimeUpError
        found = self._forward(backend, *arguments, **named)
        end = time.perf_counter()
        if self._start is None:
            self._start = end
            return found
        self.native_seconds += end - begin
        self.calls += 1
        self.rows += len(arguments[0])
        num_prompts = sum(index < RESPONSES for index in named["sample_index"])
        self.prompt_tokens += num_prompts
        self.response_tokens += len(found.tokens) - num_prompts
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every forward of the runtime inside the block is counted."""
        original, watch = CpuBackend.forward_tokens, self

        def counted(backend: CpuBackend, *arguments: Any, **named: Any) -> ForwardTokens:
            return watch.forward_tokens(backend, *arguments, **named)

        CpuBackend.forward_tokens = counted  # type: ignore[method-assign,assignment]
        try:
            yield
        except TimeUpError:
            pass
        finally:
            CpuBackend.forward_tokens = original  # type: ignore[method-assign]


class _NoProgress:
    def update(self, count: int = 1) -> None:
        """Shows nothing."""


@contextmanager
def no_progress(_total: int, _description: str, _unit: str) -> Iterator[_NoProgress]:
    yield _NoProgress()


def stage_context(bundle: Path, work: Path, config: dict[str, Any]) -> BuildContext:
    """What the stage gets in a pipeline, with the bundle's files in the places of its inputs' artifacts."""
    for role, place in (("target", bundle), ("model", bundle / "target")):
        (work / role).mkdir()
        (work / role / "model").symlink_to(place.resolve(), target_is_directory=True)
    for directory in ("out", "scratch"):
        (work / directory).mkdir()
    return BuildContext(
        stage="generate",
        out=work / "out",
        scratch=work / "scratch",
        inputs={role: work / role for role in ("target", "model")},
        manifests={},
        config=generate.keyed(config),
        seed=0,
        tracker=Trackers([]),
        progress=no_progress,
    )


def generate_config(overrides: list[str]) -> dict[str, Any]:
    register()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = compose("config", [*overrides, f"generate.num_tokens={ENDLESS}"])
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))["generate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the group `generate`")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = generate_config(arguments.overrides)
    generate.check(config)
    watch = Watch(arguments.seconds)
    with tempfile.TemporaryDirectory() as directory, watch.watching():
        generate.build(config, arguments.threads, stage_context(arguments.bundle, Path(directory), config))
    tokens = watch.prompt_tokens + watch.response_tokens
    result = {
        "bundle": arguments.bundle.name,
        "overrides": arguments.overrides,
        "seconds": watch.elapsed,
        "tok_s": tokens / watch.elapsed,
        "response_tok_s": watch.response_tokens / watch.elapsed,
        "prompt_tokens": watch.prompt_tokens,
        "response_tokens": watch.response_tokens,
        "rows_without_token": watch.rows - tokens,
        "sequences_a_call": tokens / watch.calls,
        "ms_a_call": watch.native_seconds / watch.calls * 1e3,
        "outside_native_share": 1 - watch.native_seconds / watch.elapsed,
        "resident_mb": resident_mb(),
    }
    print(
        f"{result['tok_s']:.0f} tokens/s ({result['response_tok_s']:.0f} of them in responses, the rest in prompts)"
        f" over {watch.elapsed:.0f} s;\n{result['ms_a_call']:.1f} ms a call for {result['sequences_a_call']:.1f}"
        f" sequences, {100 * result['outside_native_share']:.1f} % of the time outside native calls;"
        f" {result['rows_without_token']} rows of prompts read; {result['resident_mb']:.0f} MB"
    )
    from deploy.kernels.cpu.library import shared_runtime

    write_json(arguments.json, {"machine": fingerprint(shared_runtime(arguments.threads)), **result})


if __name__ == "__main__":
    main()
