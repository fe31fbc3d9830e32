"""quality: `quality.json`, one quantized model against its source on every held-out group."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.graph import BuildContext
from pipeline.progress import Progress
from pipeline.stages.calibrate import SAMPLES


def build(context: BuildContext) -> None:
    """Writes `quality.json`, what `measure_quality` finds."""
    model, target = context.inputs["quantize"] / "model", context.inputs["target"] / "model"
    found = measure_quality(model, target, context.inputs["calibrate"], context.progress, context.stage)
    (context.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    context.summary.update(found["model"])
    flat = {f"{group}/{key}": value for group, values in found["model"].items() for key, value in values.items()}
    context.tracker.summary(context.stage, flat)


def measure_quality(
    model: Path,
    target: Path,
    calibrate: Path,
    progress: Callable[[int, str, str], AbstractContextManager[Progress]],
    what: str = "quality",
) -> dict[str, dict[str, Any]]:
    """{"model": {group: Quality}, "source": {group: Quality}} on the held-out samples of `calibrate`, an artifact.

    model, target: model directories. what: shown beside the progress.
    """
    from compress.calibration.samples import read_samples
    from compress.load import load_float32
    from compress.quality import measure

    groups: dict[str, list[tuple[int, ...]]] = {}
    for sample in read_samples(calibrate / SAMPLES, "heldout"):
        groups.setdefault(sample.group, []).append(sample.ids)
    source, quantized = load_float32(target), load_float32(model)
    found: dict[str, dict[str, Any]] = {"model": {}, "source": {}}
    num_tokens = sum(len(ids) - 1 for sequences in groups.values() for ids in sequences)
    with progress(num_tokens, f"{what} on held-out {', '.join(groups)}", "tokens") as bar:
        for group, sequences in groups.items():
            model_quality, source_quality = measure(source, quantized, sequences, on_tokens=bar.update)
            found["model"][group], found["source"][group] = model_quality.as_dict(), source_quality.as_dict()
    return found
